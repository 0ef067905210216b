"""The whole job with `--executor kubernetes`: real steps in processes of their own, on nodes that share nothing but the store."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import tracking
from infra.contracts import WEIGHT_SUFFIXES
from tests.cluster.cluster_run import ClusterRun, cluster_run
from tests.cluster.kuberay import NEEDS_KUBERAY

pytestmark = [pytest.mark.slow, NEEDS_KUBERAY]
HEAVY = {"rows", "base", "render", "train", "merge", "export", "predict-base", "predict-adapter", "predict-merged"}


def step_of(order: str) -> str:
    return order.split("/")[1].rpartition("-")[0]


def kill_when(run: ClusterRun, home: str, moment: Callable[[], bool]) -> int:
    """Starts a driver and kills it as soon as the moment has come; its exit code, 0 where it was done before."""
    driver = run.start(home)
    while not moment() and driver.poll() is None:
        time.sleep(0.02)
    driver.kill()
    _, said = driver.communicate()
    assert driver.returncode in (-9, 0), said
    return driver.returncode


def test_driver_of_the_whole_job_killed_at_many_points_goes_on_with_the_same_run(tmp_path: Path, toy_model: Path) -> None:
    with cluster_run(tmp_path, toy_model) as run:

        def begun(step: str) -> Callable[[], bool]:
            return lambda: step in map(step_of, run.orders)

        def ended(step: str) -> Callable[[], bool]:
            return lambda: any(each.process.poll() is not None for each in run.kuberay.started if step_of(each.order) == step)

        def reports(step: str) -> Callable[[], bool]:
            return lambda: any((tmp_path / "store").glob(f"staging/{step}-*/*progress.jsonl"))

        moments = [
            lambda: (tmp_path / "home-0" / "runs").exists(),
            lambda: any((tmp_path / "store").glob("staging/rows-*/config.json")),
            begun("train"),
            reports("train"),
            ended("train"),
            begun("export"),
            begun("prove"),
        ]
        # Every other time the next driver is on another machine, which knows nothing but the addresses.
        codes = [kill_when(run, f"home-{number // 2}", moment) for number, moment in enumerate(moments)]
        assert codes == [-9] * len(moments)
        last = run.start("home-last")
        said, log = last.communicate()
        assert last.returncode == 0, log
        report = json.loads(said)
        client = tracking.client(run.tracking_uri)
        runs = client.search_runs([client.get_experiment_by_name("slipway").experiment_id], max_results=500)

    weights = {path.parent.name for path in tmp_path.glob("home-*/artifacts/*/*") if path.name.endswith(WEIGHT_SUFFIXES)}
    assert {name.rpartition("-")[0] for name in weights} == {"quantize-openvino-int8"}, "a driver has those of the chosen model alone"
    started = Counter(run.orders)
    assert set(map(step_of, started)) >= HEAVY
    assert set(started.values()) == {1}, started
    parents = [each for each in runs if tracking.PARENT_TAG not in each.data.tags]
    assert [each.info.run_id for each in parents] == [report["run_id"]]
    assert {each.info.status for each in runs} == {"FINISHED"}
    steps = Counter(each.info.run_name for each in runs if each not in parents)
    assert set(steps.values()) == {1}, steps
    assert "champion" in report["model"]["aliases"]
