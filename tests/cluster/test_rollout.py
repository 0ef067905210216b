"""Revisions, pruning, going back and destroying, asked of the loopback API server."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ArtifactError, ConfigError, TransientError
from infra.lease import Holder
from pipelines.cluster import inventory, readiness, revisions, rollout
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref
from tests.cluster.server import Server

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Cluster:
    return connect(server.kubeconfig(tmp_path / "kubeconfig"), patience_s=5)


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def deployment(name: str, image: str = "a:1") -> dict[str, Any]:
    labels = {"app": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": image}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def job(name: str, image: str = "a:1") -> dict[str, Any]:
    pod = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": image}]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": pod}}


def claim(name: str) -> dict[str, Any]:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def roll_out(cluster: Cluster, *manifests: dict[str, Any], name: str = "toy") -> dict[str, str]:
    _, changes = rollout.roll_out(cluster, name, "serving", manifests, "test", lambda _: None)
    return fates(changes)


def fates(changes: list[rollout.Change]) -> dict[str, str]:
    return {change.ref.name: change.fate for change in changes}


def states(cluster: Cluster, name: str = "toy") -> list[tuple[int, str]]:
    return [(each.number, each.state) for each in revisions.history(cluster, name)]


def names(cluster: Cluster, kind: str = "ConfigMap", api: str = "v1") -> set[str]:
    return {live["metadata"]["name"] for live in cluster.find(api, kind, {inventory.LABEL: "toy"})}


def test_first_deploy_makes_all_and_a_second_equal_one_changes_nothing(cluster: Cluster) -> None:
    assert roll_out(cluster, config_map("one", a="1"), deployment("web")) == {"one": "created", "web": "created"}
    assert roll_out(cluster, config_map("one", a="1"), deployment("web")) == {"one": "unchanged", "web": "unchanged"}
    assert states(cluster) == [(1, "superseded"), (2, "deployed")]


def test_what_is_no_longer_rendered_is_deleted_and_what_is_of_others_stays(cluster: Cluster) -> None:
    cluster.create(config_map("of-someone"))
    roll_out(cluster, config_map("other"), name="other")
    roll_out(cluster, config_map("one"), config_map("two"), deployment("web"))
    assert roll_out(cluster, config_map("one"), config_map("three")) == {
        "one": "unchanged", "three": "created", "two": "deleted", "web": "deleted",
    }  # fmt: skip
    assert names(cluster) == {"one", "three"}
    assert cluster.get(Ref("v1", "ConfigMap", "of-someone")) is not None
    assert cluster.get(Ref("v1", "ConfigMap", "other")) is not None


def test_objects_that_a_controller_made_are_not_pruned_though_they_carry_the_label(cluster: Cluster) -> None:
    roll_out(cluster, config_map("one"))
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "one", "controller": True}
    owner["uid"] = cluster.get(Ref("v1", "ConfigMap", "one"))["metadata"]["uid"]  # type: ignore[index]
    made = config_map("made")
    made["metadata"] |= {"labels": {inventory.LABEL: "toy"}, "ownerReferences": [owner]}
    cluster.create(made)
    assert roll_out(cluster, config_map("one")) == {"one": "unchanged"}
    assert "made" in names(cluster)


def test_job_is_replaced_where_it_differs_kept_while_it_runs_and_pruned_when_it_has_ended(cluster: Cluster) -> None:
    assert roll_out(cluster, job("migrate")) == {"migrate": "created"}
    assert roll_out(cluster, job("migrate")) == {"migrate": "unchanged"}
    preview = rollout.preview(cluster, "toy", [job("migrate", "a:2")])
    assert fates(preview) == {"migrate": "replaced"}
    assert roll_out(cluster, job("migrate", "a:2")) == {"migrate": "replaced"}
    ref = Ref("batch/v1", "Job", "migrate")
    cluster.merge(ref, {"status": {"active": 1}}, subresource="status")
    assert roll_out(cluster, config_map("one")) == {"one": "created"}
    cluster.merge(ref, {"status": {"active": None}}, subresource="status")
    assert roll_out(cluster, config_map("one")) == {"one": "unchanged", "migrate": "deleted"}


def test_refused_object_is_told_with_all_others_before_anything_changes(cluster: Cluster) -> None:
    first, second = deployment("web"), deployment("api")
    first["spec"]["typo"], second["spec"]["replicas"] = 1, "two"
    with pytest.raises(ConfigError) as error:
        roll_out(cluster, config_map("one"), first, second)
    assert "web" in error.value.message
    assert "api" in error.value.message
    assert names(cluster) == set()
    assert states(cluster) == []


def test_preview_says_what_would_be_without_changing_it(cluster: Cluster, server: Server) -> None:
    roll_out(cluster, config_map("one", a="1"), config_map("two"))
    version = server.objects.store.version
    changes = rollout.preview(cluster, "toy", [config_map("one", a="2"), config_map("three")])
    assert fates(changes) == {"one": "changed", "three": "created", "two": "deleted"}
    assert server.objects.store.version == version


def test_rollback_brings_back_the_last_other_revision_as_a_new_one(cluster: Cluster) -> None:
    roll_out(cluster, config_map("one", a="1"), config_map("two"))
    roll_out(cluster, config_map("one", a="2"))
    roll_out(cluster, config_map("one", a="2"))  # again: going back to it would change nothing
    revision, _ = rollout.roll_back(cluster, "toy", None, lambda _: None)
    assert (revision.number, revision.reason) == (4, "rollback to 1")
    assert names(cluster) == {"one", "two"}
    assert cluster.get(Ref("v1", "ConfigMap", "one"))["data"] == {"a": "1"}  # type: ignore[index]
    revision, _ = rollout.roll_back(cluster, "toy", 2, lambda _: None)
    assert revision.number == 5
    assert names(cluster) == {"one"}


def test_rollback_without_a_revision_to_go_to_says_which_are_kept(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="nothing of that name"):
        rollout.roll_back(cluster, "toy", None, lambda _: None)
    roll_out(cluster, config_map("one"))
    with pytest.raises(ConfigError, match="no other revision"):
        rollout.roll_back(cluster, "toy", None, lambda _: None)
    with pytest.raises(ConfigError, match="revision 7 is not kept; 1 are"):
        rollout.roll_back(cluster, "toy", 7, lambda _: None)


def test_destroy_deletes_all_but_volumes_and_the_same_command_with_data_those_too(cluster: Cluster) -> None:
    roll_out(cluster, config_map("one"), deployment("web"), claim("data"))
    kept = config_map("precious")
    kept["metadata"]["annotations"] = {inventory.KEEP: "keep"}
    roll_out(cluster, deployment("web"), claim("data"), kept)
    assert fates(rollout.destroy(cluster, "toy", False, lambda _: None)) == {"web": "deleted", "data": "kept", "precious": "kept"}
    assert states(cluster) == []
    with pytest.raises(ConfigError, match="nothing of that name"):
        rollout.destroy(cluster, "toy", False, lambda _: None)


def test_destroy_with_data_leaves_nothing(cluster: Cluster) -> None:
    roll_out(cluster, config_map("one"), claim("data"))
    assert fates(rollout.destroy(cluster, "toy", True, lambda _: None)) == {"data": "deleted", "one": "deleted"}
    assert cluster.find("v1", "PersistentVolumeClaim") == []
    assert cluster.find("v1", "ConfigMap", {revisions.OF_LABEL: "toy"}) == []


def test_volume_that_is_no_longer_rendered_keeps_its_data(cluster: Cluster) -> None:
    roll_out(cluster, claim("data"), config_map("one"))
    assert roll_out(cluster, config_map("one")) == {"one": "unchanged"}
    assert names(cluster, "PersistentVolumeClaim") == {"data"}


def test_no_more_revisions_are_kept_than_can_be_used(cluster: Cluster) -> None:
    for number in range(revisions.KEPT + 2):
        roll_out(cluster, config_map("one", a=str(number)))
    kept = [number for number, _ in states(cluster)]
    assert kept == list(range(3, revisions.KEPT + 3))
    assert states(cluster)[-1][1] == "deployed"


def test_second_deploy_at_once_is_refused_and_a_killed_one_is_taken_over(cluster: Cluster) -> None:
    wanted = inventory.labelled([config_map("one")], "toy")
    pending = revisions.begin(cluster, "toy", "serving", "by another", wanted)
    ref = Ref("v1", "ConfigMap", pending.name)

    def held_by(holder: Holder) -> None:
        cluster.merge(ref, {"metadata": {"annotations": {revisions.HOLDER: holder.model_dump_json()}}})

    held_by(Holder(space="another host", pid=1))
    with pytest.raises(TransientError, match="has been deploying revision 1"):
        roll_out(cluster, config_map("one"))
    held_by(Holder(space="another host", pid=1, since_s=time.time() - 1000))
    assert roll_out(cluster, config_map("one")) == {"one": "created"}
    assert states(cluster) == [(1, "deployed")]  # the same revision, and no second one


def test_killed_deploy_of_other_manifests_is_marked_and_a_new_revision_made(cluster: Cluster) -> None:
    revisions.begin(cluster, "toy", "serving", "cut off", inventory.labelled([config_map("one")], "toy"))
    roll_out(cluster, config_map("two"))
    assert states(cluster) == [(1, "failed"), (2, "deployed")]


def test_revision_whose_answer_was_lost_is_known_as_our_own(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    create = cluster.create

    def create_and_lose_the_answer(manifest: dict[str, Any]) -> dict[str, Any] | None:
        create(manifest)
        return create(manifest)

    monkeypatch.setattr(cluster, "create", create_and_lose_the_answer)
    wanted = inventory.labelled([config_map("one")], "toy")
    assert revisions.begin(cluster, "toy", "serving", "once", wanted).number == 1
    assert states(cluster) == [(1, "pending")]


def test_damaged_revision_is_told_and_too_large_one_refused(cluster: Cluster) -> None:
    broken = config_map("toy-rev-1")
    broken["metadata"]["labels"] = {revisions.OF_LABEL: "toy", revisions.STATE_LABEL: "deployed"}
    cluster.create(broken)
    with pytest.raises(ArtifactError, match="toy-rev-1"):
        revisions.history(cluster, "toy")
    noise = os.urandom(revisions.MAX_CONTENT_BYTES).hex()
    with pytest.raises(ConfigError, match="several parts"):
        revisions.pack([config_map("one", noise=noise)])


def test_equal_manifests_pack_equally_and_come_back_as_they_were() -> None:
    manifests = [config_map("one", text="äöü", b="2")]
    again = [json.loads(json.dumps(copy.deepcopy(manifests[0])))]
    assert revisions.pack(manifests) == revisions.pack(again)
    revision = revisions.Revision("toy", 3, "deployed", "serving", "why", "now", tuple(manifests))
    assert revisions.from_config_map(revisions.to_config_map(revision)) == revision


KILLED = """
import sys
from pathlib import Path
from pipelines.cluster import rollout
from pipelines.cluster.connect import connect
from tests.cluster.test_rollout import config_map, deployment, job
manifests = [config_map("one", a="2"), config_map("two"), deployment("web", "a:2"), job("migrate", "a:2")]
rollout.roll_out(connect(Path(sys.argv[1]), patience_s=5), "toy", "serving", manifests, "test", lambda _: None)
"""


@pytest.mark.slow
def test_deploy_that_is_killed_at_any_request_goes_on_as_the_same_revision(server: Server, cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kubeconfig")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    roll_out(cluster, config_map("one", a="1"), config_map("old"), job("migrate"))
    num_before = len(server.log)
    num_requests = None
    num_killed = 0
    # Killed at its first write, a few later, and so on, each time further on; the last run is left alone.
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, None):
        started = len(server.log)
        process = subprocess.Popen(command, env=environment)
        if share is not None:
            limit = started + int(share * (num_requests or 60))
            while len(server.log) < limit and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is None:
                num_killed += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert process.wait(60) == 0
        num_requests = num_requests or len(server.log) - started
    assert num_before < len(server.log)
    assert num_killed > 2
    assert {number for number, _ in states(cluster)} == {1, 2}
    assert states(cluster)[-1] == (2, "deployed")
    assert names(cluster) == {"one", "two"}
    assert names(cluster, "Job", "batch/v1") == {"migrate"}
    assert names(cluster, "Deployment", "apps/v1") == {"web"}


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
