"""The validator of custom kinds, on a small definition of our own and, where they are, on KubeRay's."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.crds import CRDS_VARIABLE, CustomKind, admit, custom_kinds, read_crds

CONTAINER_PORT = {
    "type": "object",
    "required": ["number"],
    "properties": {"number": {"type": "integer", "format": "int32"}, "protocol": {"type": "string", "default": "TCP"}},
}
CRANE = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["yard"],
            "x-kubernetes-validations": [
                {"rule": "!has(self.reach) || self.reach <= 100", "message": "a crane reaches 100 at most"},
                {"rule": "self.yard == oldSelf.yard", "message": "a crane stays in its yard"},
            ],
            "properties": {
                "yard": {"type": "string", "pattern": "^[a-z]+$"},
                "reach": {"type": "integer"},
                "load": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "note": {"type": "string", "nullable": True},
                "mode": {"type": "string", "enum": ["lift", "lower"], "default": "lift"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
                "since": {"type": "string", "format": "date-time"},
                "ports": {
                    "type": "array",
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["number", "protocol"],
                    "items": CONTAINER_PORT,
                },
            },
        },
    },
}
POD = {"spec": {"containers": [{"name": "ray", "image": "ray:1", "ports": [{"containerPort": 6379}]}]}}


def definition() -> dict[str, Any]:
    """A CustomResourceDefinition of one served version and one that is no more."""
    versions = [
        {"name": "v1", "served": True, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": CRANE}},
        {"name": "v0", "served": False, "schema": {"openAPIV3Schema": {}}},
    ]
    names = {"kind": "Crane", "plural": "cranes"}
    spec = {"group": "yard.example", "scope": "Namespaced", "names": names, "versions": versions}
    return {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "spec": spec}


@pytest.fixture
def crane() -> CustomKind:
    """The one served version."""
    kinds = custom_kinds([definition()])
    assert list(kinds) == [("yard.example/v1", "Crane")]
    return kinds["yard.example/v1", "Crane"]


def of(**spec: Any) -> dict[str, Any]:
    """A crane in a yard."""
    return {"apiVersion": "yard.example/v1", "kind": "Crane", "metadata": {"name": "c"}, "spec": {"yard": "north", **spec}}


def rayjob(**spec: Any) -> dict[str, Any]:
    """The smallest RayJob that KubeRay's definition takes, and `spec` over it."""
    groups = [{"groupName": "cpu", "rayStartParams": {}, "template": POD}]
    cluster = {"headGroupSpec": {"rayStartParams": {}, "template": POD}, "workerGroupSpecs": groups}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "a"}, "spec": {"rayClusterSpec": cluster, **spec}}


def test_admit_absent_fields_get_their_defaults_at_every_depth(crane: CustomKind) -> None:
    given = of(ports=[{"number": 80}])
    admission = admit(given, crane)
    assert admission.stored["spec"] == {"yard": "north", "mode": "lift", "ports": [{"number": 80, "protocol": "TCP"}]}
    assert (admission.unknown, admission.problems) == ([], [])
    assert given == of(ports=[{"number": 80}])


def test_admit_nulls_are_dropped_kept_or_defaulted_as_the_field_says(crane: CustomKind) -> None:
    admission = admit(of(reach=None, mode=None, note=None, labels={"a": None, "b": "c"}), crane)
    assert admission.stored["spec"] == {"yard": "north", "mode": "lift", "note": None, "labels": {"b": "c"}}
    assert not admission.problems


def test_admit_null_in_a_list_is_refused(crane: CustomKind) -> None:
    assert admit(of(tags=["a", None]), crane).problems == ["spec.tags[1]: string is needed, found NoneType None"]


def test_admit_unknown_fields_are_named_and_pruned(crane: CustomKind) -> None:
    admission = admit(of(raech=3, ports=[{"number": 1, "host": 2}], labels={"any": "key"}) | {"extra": 1}, crane)
    assert sorted(admission.unknown) == ["extra", "spec.ports[0].host", "spec.raech"]
    assert admission.stored["spec"] == of(ports=[{"number": 1, "protocol": "TCP"}], labels={"any": "key"}, mode="lift")["spec"]
    assert "extra" not in admission.stored


def test_admit_a_part_that_an_anchor_shares_is_pruned_in_each_place(crane: CustomKind) -> None:
    shared = {"number": 1, "host": 2}
    assert admit(of(ports=[shared, shared]), crane).unknown == ["spec.ports[0].host", "spec.ports[1].host"]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"yard": "North"}, "spec.yard: 'North' does not match '^[a-z]+$'"),
        ({"reach": "3"}, "spec.reach: integer is needed, found str '3'"),
        ({"reach": True}, "spec.reach: integer is needed, found bool True"),
        ({"mode": "swing"}, "spec.mode: 'swing' is not one of ['lift', 'lower']"),
        ({"labels": {"a": 1}}, "spec.labels.a: string is needed, found int 1"),
        ({"load": 1.5}, "spec.load: 1.5 is not valid under any of the given schemas"),
        ({"ports": [{}]}, "spec.ports[0]: 'number' is a required property"),
        ({"ports": [{"number": 2**31}]}, f"spec.ports[0].number: {2**31} does not fit int32"),
        ({"since": "yesterday"}, "spec.since: 'yesterday' is no date-time"),
        ({"tags": ["a", "b", "a"]}, "spec.tags[2]: twice in a list of type set: a"),
        ({"reach": 101}, "spec: a crane reaches 100 at most"),
        # The twin shows only after the default is set.
        (
            {"ports": [{"number": 1}, {"number": 1, "protocol": "TCP"}]},
            "spec.ports[1]: twice in a list of type map: {'number': 1, 'protocol': 'TCP'}",
        ),
    ],
)
def test_admit_wrong_value_is_named_with_its_path(crane: CustomKind, spec: dict[str, Any], problem: str) -> None:
    assert admit(of(**spec), crane).problems == [problem]


def test_admit_right_values_of_each_type_pass(crane: CustomKind) -> None:
    spec = {"load": "5Gi", "since": "2026-01-02T03:04:05Z", "tags": ["a", "b"], "reach": 100, "ports": [{"number": 1}, {"number": 2}]}
    assert admit(of(**spec), crane).problems == []
    assert admit(of(load=5, ports=[{"number": 1}, {"number": 1, "protocol": "UDP"}]), crane).problems == []


def test_admit_update_asks_the_rules_about_changes(crane: CustomKind) -> None:
    assert admit(of(yard="south"), crane, old=of()).problems == ["spec: a crane stays in its yard"]
    assert admit(of(reach=5), crane, old=of()).problems == []


def test_read_crds_empty_folder_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CRDS_VARIABLE):
        read_crds(tmp_path)


def test_read_crds_plain_and_packed_files_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump_all([definition(), {"kind": "Namespace"}])
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml.gz").write_bytes(gzip.compress(text.encode()))
    assert read_crds(tmp_path) == (definition(), definition())


def test_kuberay_smallest_rayjob_is_stored_with_the_operators_defaults(kuberay: dict[tuple[str, str], CustomKind]) -> None:
    admission = admit(rayjob(entrypoint="x", suspend=None), kuberay["ray.io/v1", "RayJob"])
    assert (admission.unknown, admission.problems) == ([], [])
    spec = admission.stored["spec"]
    assert (spec["submissionMode"], spec["backoffLimit"], "suspend" in spec) == ("K8sJobMode", 0, False)
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] == 0
    container = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"containerPort": 6379, "protocol": "TCP"}]


def test_kuberay_rules_in_cel_refuse_half_a_deletion_strategy(kuberay: dict[tuple[str, str], CustomKind]) -> None:
    kind = kuberay["ray.io/v1", "RayJob"]
    half = admit(rayjob(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}}), kind)
    whole = admit(rayjob(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}}), kind)
    assert [line.partition(":")[0] for line in half.problems] == ["spec.deletionStrategy"]
    assert whole.problems == []


def test_kuberay_field_of_another_version_is_unknown(kuberay: dict[tuple[str, str], CustomKind]) -> None:
    assert admit(rayjob(maxRetries=3), kuberay["ray.io/v1", "RayJob"]).unknown == ["spec.maxRetries"]


def test_kuberay_manager_cannot_change(kuberay: dict[tuple[str, str], CustomKind]) -> None:
    kind = kuberay["ray.io/v1", "RayJob"]
    old, new = rayjob(managedBy="ray.io/kuberay-operator"), rayjob(managedBy="kueue.x-k8s.io/multikueue")
    assert admit(new, kind, old=old).problems == ["spec.managedBy: the managedBy field is immutable"]
    assert admit(new, kind).problems == []
