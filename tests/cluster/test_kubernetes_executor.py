"""RayJobs followed to their end: the executor at the loopback API server, with a KubeRay of the tests that really runs the entry points."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.artifact_store import open_store
from infra.errors import ConfigError, SlipwayError, TransientError
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


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "bad name"}, ConfigError, "bad name"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, TransientError, "activeDeadlineSeconds"),
        ({"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed"}, TransientError, "handed to its Ray cluster"),
        ({"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "exit code 1"}, SlipwayError, "exit code 1"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, TransientError, "stopped by someone"),
    ],
)
def test_end_without_a_result_is_told_by_the_state_of_the_rayjob_which_is_deleted(
    toy: Toy, cluster: Cluster, status: dict[str, Any], error: type[SlipwayError], text: str
) -> None:
    thread, raised = in_background(toy)
    until(lambda: cluster.get(toy.ref))
    set_status(toy, **status)
    thread.join(20)
    assert [type(each) for each in raised] == [error]
    assert text in str(raised[0])
    assert cluster.get(toy.ref) is None


def make_pod(toy: Toy, status: dict[str, Any]) -> None:
    cluster, labels = toy.cluster, {"app.kubernetes.io/instance": toy.ref.name}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker", "labels": labels}}
    cluster.create({**pod, "spec": {"containers": [{"name": "ray-worker", "image": "absent:1"}]}})
    cluster.merge(Ref("v1", "Pod", "worker"), {"status": status}, subresource="status")


def container(state: dict[str, Any]) -> dict[str, Any]:
    return {"name": "ray-worker", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}


def test_pod_that_cannot_start_ends_the_wait(toy: Toy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.pod_watch.GRACE_S", {"none": 0.0, "little": 0.0})
    thread, raised = in_background(toy)
    until(lambda: cluster.get(toy.ref))
    set_status(toy, jobDeploymentStatus="Initializing")
    make_pod(toy, {"containerStatuses": [container({"waiting": {"reason": "InvalidImageName"}})]})
    thread.join(20)
    assert [type(each) for each in raised] == [ConfigError]
    assert "InvalidImageName" in str(raised[0])
    assert cluster.get(toy.ref) is None


def test_job_that_failed_of_memory_is_told_by_that(toy: Toy, cluster: Cluster) -> None:
    thread, raised = in_background(toy)
    until(lambda: cluster.get(toy.ref))
    make_pod(toy, {"containerStatuses": [container({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})]})
    set_status(toy, jobDeploymentStatus="Failed", reason="AppFailed", message="a worker died")
    thread.join(20)
    assert [type(each) for each in raised] == [ConfigError]
    assert "resources.limits.memory" in str(raised[0])


def test_rayjob_that_nobody_looks_at_is_told(toy: Toy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayjob_following, "OPERATOR_S", 0.2)
    with pytest.raises(TransientError, match="KubeRay's operator running"):
        toy.run()
    assert cluster.get(toy.ref) is None


def test_rayjob_in_a_queue_may_wait_unlooked_at(toy: Toy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayjob_following, "OPERATOR_S", 0.1)
    thread, raised = in_background(toy, values={**VALUES, "rayJob": {"queueName": "team"}})
    until(lambda: cluster.get(toy.ref))
    time.sleep(0.5)
    assert thread.is_alive()
    cluster.delete(toy.ref)
    thread.join(20)
    assert "deleted by someone" in str(raised[0])


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


DRIVER = """
import sys
from pathlib import Path
from pipelines.cluster.connect import connect
from tests.cluster.test_kubernetes_executor import Toy
place = Path(sys.argv[1])
Toy(connect(place / "kubeconfig"), place).run(text="by whichever driver", num_steps=30)
"""


def start_driver(place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(place)], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_interrupted_driver_leaves_the_job_running_and_says_how_to_end_it(
    toy: Toy, kuberay: KubeRay, cluster: Cluster, tmp_path: Path
) -> None:
    driver = start_driver(tmp_path)
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
