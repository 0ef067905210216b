"""RayJobs that end without a result, or cannot begin: what the driver says of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from pipelines.executors import rayjob_following
from tests.cluster.test_kubernetes_executor import VALUES, Toy, _quick, cluster, in_background, pytestmark, server, set_status, toy, until

__all__ = ["_quick", "cluster", "pytestmark", "server", "toy"]  # fixtures of that module


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
