"""A step on a cluster whose API server is cut off, forgets and fails all the while: done once, and told once."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.cluster.connect import connect
from pipelines.executors import rayjob_following
from tests.charts.crds import crds_folder
from tests.cluster.faults import Fault
from tests.cluster.kuberay import KubeRay, ray_definitions
from tests.cluster.server import Server, serve
from tests.cluster.test_kubernetes_executor import Toy

BETWEEN_S, FAILING_S = 0.15, 0.05
pytestmark = pytest.mark.skipif(crds_folder() is None, reason="needs KubeRay's definitions (SLIPWAY_KUBERAY_CRDS)")


@contextmanager
def misfortune(server: Server, seed: int) -> Iterator[dict[str, int]]:
    """Something goes wrong with the server every now and then; gives how often each did."""
    draw, ended = random.Random(seed), threading.Event()
    counts = {"cut": 0, "forgot": 0, "failed": 0}

    def go_on() -> None:
        while not ended.wait(BETWEEN_S * draw.random() * 2):
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
        assert sum(counts.values()) > 5
