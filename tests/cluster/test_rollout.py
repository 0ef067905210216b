"""Applying, pruning, going back and destroying, asked of the loopback API server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError
from pipelines.cluster import inventory, revisions, rollout
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref
from tests.cluster.server import Server


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
