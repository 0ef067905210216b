"""Waiting until what was deployed serves, and what keeps it from it."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError, TransientError
from pipelines.cluster import inventory, readiness, revisions
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from tests.cluster.test_rollout import config_map, deployment, roll_out


def ready(cluster: Cluster, name: str) -> None:
    status = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1, "readyReplicas": 1}
    cluster.merge(Ref("apps/v1", "Deployment", name), {"status": status}, subresource="status")


def test_waiting_ends_when_all_serves_and_tells_what_it_waits_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "POLL_S", 0.01)
    manifests = [deployment("web"), config_map("one")]
    roll_out(cluster, *manifests)
    with pytest.raises(TransientError, match="Deployment web is not ready after 0 s"):
        readiness.wait_ready(cluster, "toy", manifests, 0.0, lambda _: None)
    ready(cluster, "web")
    said: list[str] = []
    readiness.wait_ready(cluster, "toy", manifests, 5.0, said.append)
    assert said == ["  Deployment web: 1 of 1 pods are available"]


def test_waiting_raises_what_keeps_a_pod_from_starting(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "POLL_S", 0.01)
    roll_out(cluster, deployment("web"))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-1", "labels": {inventory.LABEL: "toy"}}}
    cluster.create({**pod, "spec": {"containers": [{"name": "main", "image": "absent:1"}]}})
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    container = {"name": "main", "image": "absent:1", "imageID": "", "ready": False, "restartCount": 0, "state": waiting}
    cluster.merge(Ref("v1", "Pod", "web-1"), {"status": {"containerStatuses": [container]}}, subresource="status")
    with pytest.raises(ConfigError, match=r"ImagePullBackOff \(not found\)"):
        readiness.wait_ready(cluster, "toy", [deployment("web")], 0.0, lambda _: None)
    rows = readiness.overview(cluster, inventory.members(cluster, "toy", revisions.history(cluster, "toy")), "toy")
    assert [(str(ref), found.phase) for ref, found in rows] == [("Deployment default/web", "waiting"), ("Pod default/web-1", "failed")]
