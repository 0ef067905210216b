"""The whole job on a Ray cluster: an S3 bucket, an MLflow server and the Jobs API are all that driver and nodes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from infra import tracking
from infra.artifact_store import open_store
from tests import backends
from tests.ray_nodes import ACCESS, TOKEN, RayNodes, ray_nodes

RUN_TIMEOUT_S = 1500.0


def jobs_of(nodes: RayNodes) -> dict[str, dict[str, Any]]:
    """Every job that was ever submitted, with what Ray says of it."""
    request = urllib.request.Request(f"{nodes.jobs_address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return {job["submission_id"]: job for job in json.load(response) if job["type"] == "SUBMISSION"}


def start_driver(home: Path, spec: Path, nodes: RayNodes, store_url: str, tracking_uri: str, log_file: Path) -> subprocess.Popen[bytes]:
    """`slipway run` as on a machine that has nothing but the addresses."""
    variables = {"SLIPWAY_HOME": str(home), "SLIPWAY_STORE": store_url, "MLFLOW_TRACKING_URI": tracking_uri, **ACCESS}
    variables["RAY_API_SERVER_ADDRESS"] = nodes.jobs_address
    command = [sys.executable, "-m", "pipelines.cli", "run", str(spec), "--executor", "ray", "--no-serve", "--json"]
    command += ["--set", "quantize.formats=[openvino-int8]", "--set", "train.cpus_per_worker=1"]
    with log_file.open("wb") as log, log_file.with_suffix(".json").open("wb") as report:
        return subprocess.Popen(command, env={**os.environ, **variables}, stdout=report, stderr=log)


@pytest.mark.slow
def test_whole_run_on_a_cluster_whose_driver_is_killed_twice_is_one_run(toy_spec: Path, bucket: str, tmp_path: Path) -> None:
    store_url = f"{bucket}/{tmp_path.name}"
    options = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--default-artifact-root", "mlflow-artifacts:/"]
    options += ["--artifacts-destination", str(tmp_path / "mlflow-files")]
    with (
        backends.mlflow_server(tmp_path / "server", options) as server,
        ray_nodes(tmp_path / "ray", (2,), {"MLFLOW_TRACKING_URI": server.url, "SLIPWAY_STORE": store_url}) as nodes,
    ):
        for number, step in enumerate(("train", "quantize-openvino-int8")):  # each time on another machine, while the program runs
            driver = start_driver(tmp_path / f"home-{number}", toy_spec, nodes, store_url, server.url, tmp_path / f"driver-{number}.log")
            deadline_s = time.monotonic() + RUN_TIMEOUT_S
            while not any(name.startswith(f"slipway-{step}-") and job["status"] == "RUNNING" for name, job in jobs_of(nodes).items()):
                assert driver.poll() is None, (tmp_path / f"driver-{number}.log").read_text()
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            driver.kill()
            driver.wait()
        driver = start_driver(tmp_path / "home-2", toy_spec, nodes, store_url, server.url, tmp_path / "driver-2.log")
        assert driver.wait(RUN_TIMEOUT_S) == 0, (tmp_path / "driver-2.log").read_text()
        report: dict[str, Any] = json.loads((tmp_path / "driver-2.json").read_text())
        jobs = jobs_of(nodes)
        check_tracked(server.url, report)
        logs = [path.read_text() for path in (tmp_path / "home-2").glob("runs/*/logs/*.log")]
    assert {name: job["message"] for name, job in jobs.items() if job["status"] != "SUCCEEDED"} == {}
    ran = Counter(name.removeprefix("slipway-").split("-")[0] for name in jobs)
    assert (ran["train"], ran["merge"], ran["quantize"], ran["prove"]) == (1, 1, 1, 3)  # prove: both stacks' scores, and the server
    assert logs
    assert report["model"]["aliases"] == ["challenger", "champion"]
    assert all(gate["passed"] for gate in report["gates"])
    store = open_store(store_url)
    names = {name.partition("/")[0] for name in store.place.names("artifacts")}
    assert {name.rpartition("-")[0] for name in names} >= {"base", "rows", "render", "train", "merge", "quantize-openvino-int8", "prove"}
    assert store.place.names("staging") == []
    assert store.place.names("runs") == []


def check_tracked(url: str, report: dict[str, Any]) -> None:
    """One MLflow run, finished, with one nested run a step; the training's figures are in its own."""
    client = tracking.client(url)
    (experiment,) = [each for each in client.search_experiments() if each.name == "slipway"]
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    (parent,) = [run for run in runs if tracking.PARENT_TAG not in run.data.tags]
    assert (parent.info.run_id, parent.info.status) == (report["run_id"], "FINISHED")
    nested = Counter(run.info.run_name for run in runs if tracking.PARENT_TAG in run.data.tags)
    assert set(nested.values()) == {1}
    assert all(run.info.status == "FINISHED" for run in runs)
    (train,) = [run for run in runs if run.info.run_name == "train"]
    assert [point.step for point in client.get_metric_history(train.info.run_id, "loss")][-1] == 12
