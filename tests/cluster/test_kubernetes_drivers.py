"""Drivers that are cut off, interrupted or killed, and RayJobs that they find when they come again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from tests.cluster.kuberay import KubeRay
from tests.cluster.server import Server
from tests.cluster.test_kubernetes_executor import (
    REPOSITORY,
    Toy,
    _quick,
    cluster,
    in_background,
    kuberay,
    pytestmark,
    server,
    set_status,
    toy,
    until,
)

__all__ = ["_quick", "cluster", "kuberay", "pytestmark", "server", "toy"]  # fixtures of that module


@pytest.mark.slow
def test_failed_rayjob_of_an_earlier_driver_makes_room_for_a_new_one(toy: Toy, server: Server, cluster: Cluster, tmp_path: Path) -> None:
    thread, _ = in_background(toy, text="first")
    until(lambda: cluster.get(toy.ref))
    first = cluster.get(toy.ref)
    assert first is not None
    cluster.merge(toy.ref, {"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}})  # so that its end takes the operator
    set_status(toy, jobDeploymentStatus="Failed", reason="SubmissionFailed", failed=2)
    thread.join(20)
    with KubeRay(server, connect(tmp_path / "kubeconfig"), tmp_path / "nodes") as kuberay:
        toy.run(text="second")
        assert len(kuberay.started) == 1
    assert toy.text == "second"


@pytest.mark.slow
def test_cut_connections_and_a_forgotten_history_do_not_disturb_it(
    toy: Toy, server: Server, kuberay: KubeRay, cluster: Cluster, tmp_path: Path
) -> None:
    thread, raised = in_background(toy, num_steps=40)
    until(lambda: kuberay.started)
    for _ in range(3):
        server.cut()
        server.compact()
        time.sleep(0.3)
    thread.join(30)
    assert raised == []
    assert toy.log_file.read_text().count("toy step ends") == 1
    assert len(kuberay.started) == 1


DRIVER = """
import sys
from pathlib import Path
from pipelines.cluster.connect import connect
from tests.cluster.test_kubernetes_executor import Toy
place = Path(sys.argv[1])
Toy(connect(place / "kubeconfig"), place).run(text="by whichever driver", num_steps=int(sys.argv[2]))
"""


def start_driver(place: Path, num_steps: int = 30) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(place), str(num_steps)], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_interrupted_driver_leaves_the_job_running_and_says_how_to_end_it(
    toy: Toy, kuberay: KubeRay, cluster: Cluster, tmp_path: Path
) -> None:
    driver = start_driver(tmp_path, num_steps=2000)  # which nobody waits for
    until(lambda: kuberay.started)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=30)
    assert f"kubectl --namespace default delete rayjob {toy.ref.name}" in said
    assert cluster.get(toy.ref) is not None
    assert kuberay.started[0].process.poll() is None


@pytest.mark.slow
def test_driver_killed_at_any_point_and_started_again_follows_the_same_run(
    toy: Toy, server: Server, kuberay: KubeRay, cluster: Cluster, tmp_path: Path
) -> None:
    # Before it has sent anything, with the order sent, with the RayJob applied, while it starts, runs and ends, and after its end.
    moments: list[Callable[[], object]] = [
        lambda: (tmp_path / "store").exists(),
        lambda: list((tmp_path / "store").rglob("config.json")),
        lambda: cluster.get(toy.ref),
        lambda: kuberay.started,
        lambda: list((tmp_path / "store").rglob("*progress.jsonl")),
        lambda: list((tmp_path / "store").rglob("*result.json")),
        lambda: (toy.slot / "output").exists(),
    ]
    uids: set[str] = set()
    for moment in moments:
        driver = start_driver(tmp_path)
        until(lambda driver=driver, moment=moment: moment() or driver.poll() is not None)  # type: ignore[misc]
        if (live := cluster.get(toy.ref)) is not None:
            uids.add(live["metadata"]["uid"])
        driver.kill()
        driver.communicate()
    last = start_driver(tmp_path)
    _, said = last.communicate(timeout=60)
    assert last.returncode == 0, said
    assert toy.text == "by whichever driver"
    assert len(uids) <= 1
    assert len(kuberay.started) == 1
    until(lambda: cluster.get(toy.ref) is None)
