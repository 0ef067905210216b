"""RayJobs followed to their end: the executor at the loopback API server, with a KubeRay of the tests that really runs the entry points."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.artifact_store import open_store
from infra.errors import ConfigError, TransientError
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref
from pipelines.executors import kubernetes, rayjob_following
from pipelines.executors.kubernetes import KubernetesExecutor, job_name
from tests.cluster.kuberay import NEEDS_KUBERAY, KubeRay, ray_definitions
from tests.cluster.server import Server
from tests.cluster.toy_step import ToyJob
from tests.conftest import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "tests.cluster.toy_step"
VALUES = {"rayJob": {"backoffLimit": 1}, "store": {"existingClaim": "shared"}}
pytestmark = NEEDS_KUBERAY


@pytest.fixture
def server(server: Server) -> Server:
    server.install(ray_definitions())
    return server


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Cluster:
    return connect(server.kubeconfig(tmp_path / "kubeconfig"), patience_s=5)


@pytest.fixture
def kuberay(server: Server, cluster: Cluster, tmp_path: Path) -> Iterator[KubeRay]:
    with KubeRay(server, connect(tmp_path / "kubeconfig"), tmp_path / "nodes") as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayjob_following, "TICK_S", 0.02)
    monkeypatch.setattr(rayjob_following, "STORE_S", 0.05)
    monkeypatch.setattr(rayjob_following, "PODS_S", 0.05)


class Toy:
    """One step's program, and the driver that wants it made."""

    def __init__(self, cluster: Cluster, place: Path) -> None:
        self.cluster, self.home = cluster, place / "home"
        self.store = open_store((place / "store").as_uri())
        self.slot = self.home / "staging" / "toy-0123456789abcdef"
        self.log_file = self.home / "toy.log"
        self.num_ticks = 0
        self.ref = Ref("ray.io/v1", "RayJob", job_name("slipway-toy-0123456789abcdef", self.store.place.url))

    def job(self, **fields: Any) -> ToyJob:
        return ToyJob(output_dir=self.slot / "output", progress_file=self.slot / "progress.jsonl", **fields)

    def run(self, values: dict[str, Any] | None = None, **fields: Any) -> None:
        self.slot.mkdir(parents=True, exist_ok=True)
        executor = KubernetesExecutor(self.cluster, self.store, self.home, values or VALUES)
        executor.run_to_end(MODULE, self.job(**fields), self.slot / "config.json", self.log_file, self._tick)

    def _tick(self) -> None:
        self.num_ticks += 1

    @property
    def text(self) -> str:
        return (self.slot / "output" / "text").read_text()


@pytest.fixture
def toy(cluster: Cluster, tmp_path: Path) -> Toy:
    return Toy(cluster, tmp_path)


def until(what: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def set_status(toy: Toy, **status: object) -> None:
    toy.cluster.merge(toy.ref, {"status": status}, subresource="status")


def in_background(toy: Toy, **fields: Any) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            toy.run(**fields)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def test_program_runs_on_a_node_and_its_output_log_and_progress_come_home(toy: Toy, kuberay: KubeRay, cluster: Cluster) -> None:
    toy.run(text="from afar")
    assert toy.text == "from afar"
    assert "toy step ends" in toy.log_file.read_text()
    assert '"done": 3' in (toy.slot / "progress.jsonl").read_text()
    assert toy.num_ticks > 3
    until(lambda: cluster.get(toy.ref) is None)
    assert len(kuberay.started) == 1
    toy.run(text="from afar")  # what lies in the store is not made again
    assert len(kuberay.started) == 1


def test_rayjob_is_what_the_values_say_and_is_owned_by_us(toy: Toy, cluster: Cluster) -> None:
    values = {**VALUES, "rayJob": {"queueName": "team", "activeDeadlineSeconds": 77}, "labels": {"cost": "a"}}
    thread, raised = in_background(toy, values=values)
    until(lambda: cluster.get(toy.ref))
    live = cluster.get(toy.ref)
    assert live is not None
    assert live["spec"]["activeDeadlineSeconds"] == 77
    assert live["metadata"]["labels"] | {"kueue.x-k8s.io/queue-name": "team", "cost": "a"} == live["metadata"]["labels"]
    assert f"--job staging/{toy.slot.name}/config.json --module {MODULE}" in live["spec"]["entrypoint"]
    assert {entry["manager"] for entry in live["metadata"]["managedFields"]} == {"slipway"}
    cluster.delete(toy.ref)
    thread.join(20)
    assert [type(error) for error in raised] == [TransientError]
    assert "deleted by someone" in str(raised[0])


@pytest.mark.slow
def test_known_error_of_the_program_arrives_as_itself_and_costs_no_second_cluster(toy: Toy, kuberay: KubeRay, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="no such row"):
        toy.run(fails_by="no such row")
    assert len(kuberay.started) == 1
    until(lambda: cluster.get(toy.ref) is None)


@pytest.mark.slow
def test_lost_node_costs_a_try_and_the_job_goes_on(toy: Toy, kuberay: KubeRay, tmp_path: Path) -> None:
    thread, raised = in_background(toy, hangs_once_in=tmp_path)
    wait_for(tmp_path / "mark")
    os.killpg(kuberay.started[0].process.pid, signal.SIGKILL)
    thread.join(30)
    assert raised == []
    assert toy.text == "made"
    assert len(kuberay.started) == 2


@pytest.mark.slow
def test_preempted_job_waits_and_goes_on_when_there_is_room(toy: Toy, kuberay: KubeRay, cluster: Cluster, tmp_path: Path) -> None:
    thread, raised = in_background(toy, hangs_once_in=tmp_path)
    wait_for(tmp_path / "mark")
    cluster.merge(toy.ref, {"spec": {"suspend": True}})
    until(lambda: (cluster.get(toy.ref) or {}).get("status", {}).get("jobDeploymentStatus") == "Suspended")
    assert kuberay.started[0].process.poll() is not None
    assert thread.is_alive()
    cluster.merge(toy.ref, {"spec": {"suspend": False}})
    thread.join(30)
    assert raised == []
    assert toy.text == "made"


def test_store_of_the_values_must_be_the_drivers(toy: Toy) -> None:
    with pytest.raises(ConfigError, match=r"s3://other, and SLIPWAY_STORE is file://"):
        toy.run(values={"store": {"url": "s3://other"}})


def test_names_are_such_as_kuberay_takes_and_differ_where_slot_or_store_does() -> None:
    long = "slipway-predict-openvino-int8-awq-lora-0123456789abcdef-score"
    slots = [long, long + "2", "slipway-a_b-0123456789abcdef", "slipway-a.b-0123456789abcdef"]
    names = [job_name(slot, store) for slot in slots for store in ("s3://one", "s3://two")]
    assert len(set(names)) == len(names)
    assert all(len(name) <= kubernetes.MAX_NAME_CHARS and name.replace("-", "").isalnum() and name[-1] != "-" for name in names)
    assert job_name(long, "s3://one") == names[0]
