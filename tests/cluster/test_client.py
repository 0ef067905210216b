"""The driver's client against a server that misbehaves as real ones do: away for a while, forgetful, cut off in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import ConfigError, TransientError
from pipelines.cluster import client
from pipelines.cluster.apply import apply, asked_of, check_all
from pipelines.cluster.capabilities import api_versions, kube_version
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref, in_install_order, ref_of
from tests.cluster.certificate import certificate_and_key
from tests.cluster.conftest import WIDGET_DEFINITION
from tests.cluster.faults import Fault, gone
from tests.cluster.samples import config_map, deployment, job, named, widget
from tests.cluster.server import Server

BROKEN = Fault(500, "InternalError", "failed calling webhook: connection refused")


def test_connect_without_any_kubeconfig_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"absent does not exist.*Set KUBECONFIG"):
        connect()


def test_connect_by_an_unknown_context_names_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*--context"):
        connect(server.kubeconfig(tmp_path / "config"), context="nowhere")


def test_connect_with_a_file_that_is_no_kubeconfig_gives_an_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[1, 2")
    with pytest.raises(ConfigError, match="config"):
        connect(tmp_path / "config")


def test_connect_by_the_environment_takes_the_namespace_of_the_context(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config", namespace="kube-system")))
    assert connect().namespace == "kube-system"
    assert connect(namespace="other").namespace == "other"


def test_connect_in_a_pod_takes_its_account_and_namespace(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(server.token)
    (tmp_path / "ca.crt").write_bytes(certificate_and_key()[0])
    (tmp_path / "namespace").write_text("kube-system")
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr("pipelines.cluster.connect.POD_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
    connected = connect()
    assert connected.namespace == "kube-system"
    assert connected.create(config_map()) is not None


def test_request_that_fails_for_a_moment_is_tried_again(server: Server, cluster: Cluster) -> None:
    cluster.has_kind("v1", "ConfigMap")
    server.fail_next(BROKEN)
    assert cluster.create(config_map()) is not None
    assert [line.split()[-1] for line in server.log[-2:]] == ["500", "201"]


def test_request_waits_as_long_as_the_server_asks(server: Server, cluster: Cluster) -> None:
    cluster.has_kind("v1", "ConfigMap")
    server.fail_next(Fault(429, "TooManyRequests", "slow down", headers={"Retry-After": "60"}))
    with pytest.raises(TransientError, match="slow down"):  # a minute is more than the two seconds that this client has
        cluster.get(Ref("v1", "ConfigMap", "x"))
    assert server.log[-1].endswith("429")


def test_server_that_stays_away_gives_a_transient_error(server: Server, cluster: Cluster) -> None:
    server.shutdown()
    server.server_close()
    cluster.patience_s = 0.2
    with pytest.raises(TransientError, match=r"read ConfigMap x|look up v1.*did not answer"):
        cluster.get(Ref("v1", "ConfigMap", "x"))


def test_refusals_say_what_to_do_and_are_not_tried_again(server: Server, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"422.*metadata\.name"):
        cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "Upper"}})
    with pytest.raises(ConfigError, match=r"404.*absent.*namespace"):
        cluster.create(config_map(namespace="absent"))
    server.fail_next(Fault(403, "Forbidden", "configmaps is forbidden"))
    with pytest.raises(ConfigError, match=r"403.*forbidden.*kubectl auth can-i"):
        cluster.get(Ref("v1", "ConfigMap", "x"))
    assert sum(line.endswith(("422", "403")) for line in server.log) == 2


def test_namespace_that_is_being_deleted_is_worth_another_try(cluster: Cluster) -> None:
    cluster.patience_s = 0.1
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "going", "finalizers": ["slipway.dev/test"]}}
    cluster.create(space)
    cluster.delete(ref_of(space))
    with pytest.raises(TransientError, match="being terminated"):
        cluster.create(config_map(namespace="going"))


def test_kind_that_the_cluster_lacks_is_an_error_to_write_and_nothing_to_read(cluster: Cluster) -> None:
    ref = Ref("ray.io/v1", "RayJob", "train")
    assert cluster.get(ref) is None
    assert cluster.find("ray.io/v1", "RayJob") == []
    assert cluster.delete(ref) is False
    with pytest.raises(ConfigError, match=r"no RayJob of ray\.io/v1.*KubeRay"):
        apply(cluster, {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "train"}})


def test_create_of_a_taken_name_gives_none(cluster: Cluster) -> None:
    made = config_map()
    assert cluster.create(made) is not None
    assert cluster.create(made) is None


def test_object_that_no_server_takes_is_refused_before_it_is_sent(server: Server, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="an API server takes 3145728"):
        cluster.create(config_map({"a": "x" * (3 << 20)}))
    assert not any(line.startswith("POST") for line in server.log)


def test_certificate_of_somebody_else_is_a_config_error(server: Server, tmp_path: Path) -> None:
    file = server.kubeconfig(tmp_path / "kubeconfig")
    content = yaml.safe_load(file.read_text())
    del content["clusters"][0]["cluster"]["certificate-authority-data"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="certificate in the kubeconfig"):
        connect(file, patience_s=2.0).get(Ref("v1", "ConfigMap", "x"))


def test_find_reads_all_pages_and_begins_again_when_they_expire(server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAGE_ITEMS", 2)
    names = {cluster.create(config_map(labels={"a": "b"}))["metadata"]["name"] for _ in range(5)}  # type: ignore[index]
    assert [item["metadata"]["name"] for item in cluster.find("v1", "ConfigMap", {"a": "b"})] == sorted(names)
    server.fail_next(None, gone())
    assert [item["metadata"]["name"] for item in cluster.find("v1", "ConfigMap", {"a": "b"})] == sorted(names)
    assert [line.split()[-1] for line in server.log[-3:]] == ["200", "410", "200"]


def test_object_that_a_finalizer_holds_is_named_with_it(cluster: Cluster) -> None:
    made = config_map(finalizers=["slipway.dev/held"])
    cluster.create(made)
    assert cluster.delete(ref_of(made))
    with pytest.raises(TransientError, match=r"slipway\.dev/held"):
        cluster.wait_gone(ref_of(made), 0.0)


def test_apply_tells_created_changed_and_unchanged(cluster: Cluster) -> None:
    made = config_map()
    assert apply(cluster, made, dry_run=True).change == "created"
    assert cluster.get(ref_of(made)) is None
    assert [apply(cluster, each).change for each in (made, made, {**made, "data": {"a": "2"}})] == ["created", "unchanged", "changed"]


def test_status_that_a_controller_writes_meanwhile_is_no_change(cluster: Cluster) -> None:
    live = apply(cluster, deployment()).live
    later = cluster.merge(ref_of(live), {"status": {"replicas": 1}}, subresource="status")
    assert later["status"] == {"replicas": 1}
    assert asked_of(later) == asked_of(live)


def test_apply_over_another_manager_names_field_and_owner_until_forced(cluster: Cluster) -> None:
    made = deployment(replicas=1)
    apply(cluster, made)
    scaled = {"spec": {"replicas": 5}}
    query, kind = {"fieldManager": "kubectl"}, "application/merge-patch+json"
    cluster.request("PATCH", cluster.path_of(ref_of(made)), "scale", query=query, body=scaled, content_type=kind)
    with pytest.raises(ConfigError, match=r'(?s)\.spec\.replicas: conflict with "kubectl".*by force'):
        apply(cluster, made)
    assert apply(cluster, made, force=True).live["spec"]["replicas"] == 1


def test_apply_of_a_field_that_the_schema_lacks_is_a_config_error_at_once(server: Server, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"\.spec\.replica: field not declared in schema"):
        apply(cluster, deployment(replica=2))
    assert sum(line.startswith("PATCH") for line in server.log) == 1


def test_apply_of_what_may_not_change_says_to_delete_it_first(cluster: Cluster) -> None:
    made = job()
    apply(cluster, made)
    pod = {**made["spec"]["template"]["spec"], "containers": [{"name": "app", "image": "registry.example/app:2"}]}
    with pytest.raises(ConfigError, match=r"immutable.*delete the object"):
        apply(cluster, named(made, spec={"suspend": True, "template": {"spec": pod}}))


def test_check_all_lists_every_refusal_and_changes_nothing(server: Server, cluster: Cluster) -> None:
    bad = [deployment(replica=2), deployment(selector={"matchLabels": {"app": "other"}})]
    with pytest.raises(ConfigError, match=r"(?s)refuses 2 of 3 objects.*spec\.replica.*does not match template"):
        check_all(cluster, [*bad, config_map()])
    assert [each.change for each in check_all(cluster, [config_map(), deployment()])] == ["created", "created"]
    assert cluster.find("v1", "ConfigMap") == []
    assert all("dryRun=All" in line for line in server.log if line.startswith("PATCH"))


def test_check_all_takes_on_trust_what_needs_a_namespace_or_a_kind_that_is_still_to_come(cluster: Cluster) -> None:
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "fresh"}}
    inside = {**widget(), "metadata": {"name": "first", "namespace": "fresh"}}
    manifests = [space, WIDGET_DEFINITION, inside]
    assert [each.change for each in check_all(cluster, manifests)] == ["created"] * 3
    assert cluster.get(ref_of(space)) is None
    assert [str(apply(cluster, each).ref) for each in in_install_order(manifests[::-1])] == [
        "Namespace fresh", "CustomResourceDefinition widgets.test.slipway.dev", "Widget fresh/first",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a widget is no larger than its limit"):
        check_all(cluster, [space, {**inside, "spec": {"size": 5, "limit": 4}}])


def test_install_order_puts_needs_first_and_custom_kinds_last() -> None:
    kinds = ["RayService", "Deployment", "Role", "Service", "Secret", "ServiceAccount", "Namespace", "PersistentVolumeClaim"]
    ordered = [each["kind"] for each in in_install_order([{"kind": kind} for kind in kinds])]
    assert ordered == ["Namespace", "ServiceAccount", "Secret", "PersistentVolumeClaim", "Role", "Service", "Deployment", "RayService"]


@pytest.mark.parametrize("missing", ["apiVersion", "kind", "name"])
def test_manifest_without_a_name_of_its_own_is_refused(missing: str) -> None:
    made: dict[str, Any] = config_map()
    (made["metadata"] if missing == "name" else made).pop(missing)
    with pytest.raises(ConfigError, match="all three are needed"):
        ref_of(made)


def test_capabilities_are_in_the_words_of_helm(cluster: Cluster) -> None:
    apply(cluster, WIDGET_DEFINITION)
    assert kube_version(cluster) == "1.34.0"
    assert {"v1", "v1/ConfigMap", "apps/v1/Deployment", "test.slipway.dev/v1", "test.slipway.dev/v1/Widget"} <= set(api_versions(cluster))


def test_capabilities_pass_over_an_api_that_is_away(server: Server, cluster: Cluster) -> None:
    server.kinds_away.add("apps/v1")
    versions = api_versions(cluster)
    assert "apps/v1" in versions
    assert "apps/v1/Deployment" not in versions
