"""Steps and deploys on a cluster whose API server is cut off, forgets and fails all the while."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.errors import TransientError
from pipelines.cluster import inventory, revisions, rollout
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import ref_of
from pipelines.executors import rayjob_following
from tests.charts.crds import crds_folder
from tests.cluster.faults import Fault
from tests.cluster.kuberay import KubeRay, ray_definitions
from tests.cluster.samples import config_map, deployment
from tests.cluster.server import Server, serve
from tests.cluster.test_kubernetes_executor import Toy

FAILING_S = 0.05
pytestmark = pytest.mark.skipif(crds_folder() is None, reason="needs KubeRay's definitions (SLIPWAY_KUBERAY_CRDS)")


@contextmanager
def misfortune(server: Server, seed: int, between_s: float = 0.15) -> Iterator[dict[str, int]]:
    """Something goes wrong with the server every now and then; gives how often each did."""
    draw, ended = random.Random(seed), threading.Event()
    counts = {"cut": 0, "forgot": 0, "failed": 0}

    def go_on() -> None:
        while not ended.wait(between_s * draw.random() * 2):
            what = draw.choice(list(counts))
            counts[what] += 1
            if what == "cut":
                server.cut()
            elif what == "forgot":
                server.compact()
            else:
                server.fail_next(*[Fault(draw.choice([429, 500, 502, 503, 504]), "Unlucky", "try again")] * 2)
                ended.wait(FAILING_S)
                server.recover()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_step_on_an_unlucky_server_is_done_once_and_its_log_told_once(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value_s in {"TICK_S": 0.02, "STORE_S": 0.05, "PODS_S": 0.05}.items():
        monkeypatch.setattr(rayjob_following, name, value_s)
    with serve() as server:
        server.install(ray_definitions())
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        toy = Toy(connect(kubeconfig, patience_s=60), tmp_path)
        with KubeRay(server, connect(kubeconfig), tmp_path / "nodes") as kuberay, misfortune(server, seed) as counts:
            toy.run(text="all the same", num_steps=40)
        assert toy.text == "all the same"
        assert len(kuberay.started) == 1
        lines = toy.log_file.read_text().splitlines()
        assert len(lines) == len(set(lines))
        assert "toy step of process" in lines[0]
        assert sum(counts.values()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_deploys_on_an_unlucky_server_end_in_what_was_deployed_last(seed: int, tmp_path: Path) -> None:
    with serve() as server:
        cluster = connect(server.kubeconfig(tmp_path / "kubeconfig"), patience_s=60)
        number = 0
        with misfortune(server, seed, 0.08) as counts:
            while number < 4 or sum(counts.values()) <= 2:  # as many as it takes: a fast machine has made four before anything goes wrong
                number += 1
                manifests = [shared(number), deployment(f"registry.example/app:{number}"), config_map({"a": str(number)})]
                insist(lambda manifests=manifests: rollout.roll_out(cluster, "toy", "serving", manifests, "test", lambda _: None))
        past = revisions.history(cluster, "toy")
        assert [each.state for each in past] == ["superseded"] * (len(past) - 1) + ["deployed"]
        members = inventory.members(cluster, "toy", past)
        assert {ref_of(live).name for live in members} == {each["metadata"]["name"] for each in manifests}
        assert next(live["data"] for live in members if ref_of(live).name == "shared") == {"number": str(number)}
        with misfortune(server, seed + 100, 0.08):
            insist(lambda: rollout.destroy(cluster, "toy", True, lambda _: None))
        assert cluster.find("v1", "ConfigMap") + cluster.find("apps/v1", "Deployment") == []


def shared(number: int) -> dict[str, Any]:
    """An object that every revision has, with other content."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "shared"}, "data": {"number": str(number)}}


def insist(action: Callable[[], object], tries: int = 5) -> None:
    """Does what the message of a TransientError says: the same again."""
    for left in reversed(range(tries)):
        try:
            action()
            return
        except TransientError:
            if not left:
                raise
