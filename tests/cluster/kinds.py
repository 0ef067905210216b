"""The kinds that the server has: the built-in ones that charts use, and those that CustomResourceDefinitions bring."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.charts.crds import CustomKind, custom_kinds
from tests.charts.structural import Schema

KUBERNETES = "1.34.0"
# Group and version: kinds with their plurals; `*` has no namespace, `+` has a status that is a subresource.
BUILT_IN = {
    "v1": "*+Namespace=namespaces *+Node=nodes +Pod=pods +Service=services ConfigMap=configmaps Secret=secrets "
    "ServiceAccount=serviceaccounts +PersistentVolumeClaim=persistentvolumeclaims *+PersistentVolume=persistentvolumes "
    "Event=events +ResourceQuota=resourcequotas LimitRange=limitranges",
    "apps/v1": "+Deployment=deployments +StatefulSet=statefulsets +DaemonSet=daemonsets +ReplicaSet=replicasets",
    "batch/v1": "+Job=jobs +CronJob=cronjobs",
    "autoscaling/v2": "+HorizontalPodAutoscaler=horizontalpodautoscalers",
    "policy/v1": "+PodDisruptionBudget=poddisruptionbudgets",
    "networking.k8s.io/v1": "NetworkPolicy=networkpolicies +Ingress=ingresses *IngressClass=ingressclasses",
    "rbac.authorization.k8s.io/v1": "Role=roles RoleBinding=rolebindings *ClusterRole=clusterroles *ClusterRoleBinding=clusterrolebindings",
    "scheduling.k8s.io/v1": "*PriorityClass=priorityclasses",
    "storage.k8s.io/v1": "*StorageClass=storageclasses",
    "coordination.k8s.io/v1": "Lease=leases",
    "apiextensions.k8s.io/v1": "*+CustomResourceDefinition=customresourcedefinitions",
}
FREE_FORM: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
# The one schema that contains itself; what a definition's own schema says is not checked here.
RECURSIVE = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps"
INT_OR_STRING = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
}


@dataclass(frozen=True)
class Kind:
    """One kind in one version."""

    group: str
    version: str
    kind: str
    plural: str
    is_namespaced: bool
    has_status: bool
    is_custom: bool
    schema: Schema

    @property
    def api_version(self) -> str:
        """`apps/v1`, or `v1` in the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def as_custom(self) -> CustomKind:
        """What the validator of custom kinds wants to know, which serves for the others too."""
        return CustomKind(self.api_version, self.kind, self.plural, self.is_namespaced, self.has_status, self.schema)


class Kinds:
    """All kinds that are served now."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str, str], Kind] = {}
        for api_version, entries in BUILT_IN.items():
            for entry in entries.split():
                self._add_built_in(api_version, entry)

    def _add_built_in(self, api_version: str, entry: str) -> None:
        group, _, version = api_version.rpartition("/")
        name, _, plural = entry.lstrip("*+").partition("=")
        schema = built_in_schema(group, version, name)
        flags = entry[: len(entry) - len(entry.lstrip("*+"))]
        self._kinds[group, version, plural] = Kind(group, version, name, plural, "*" not in flags, "+" in flags, False, schema)

    def define(self, definition: Mapping[str, Any]) -> None:
        """Serves the kind of a CustomResourceDefinition, in each of its served versions."""
        self.withdraw(definition)
        for custom in custom_kinds([definition]).values():
            group, _, version = custom.api_version.rpartition("/")
            kind = Kind(
                group, version, custom.kind, custom.plural, custom.is_namespaced, custom.has_status, True, whole_schema(custom.schema)
            )
            self._kinds[group, version, kind.plural] = kind

    def withdraw(self, definition: Mapping[str, Any]) -> None:
        """Serves the kind no longer."""
        spec = definition["spec"]
        for key in [key for key in self._kinds if (key[0], key[2]) == (spec["group"], spec["names"]["plural"])]:
            del self._kinds[key]

    def find(self, group: str, version: str, plural: str) -> Kind | None:
        """The kind at a path."""
        return self._kinds.get((group, version, plural))

    def __iter__(self) -> Iterator[Kind]:
        return iter(list(self._kinds.values()))


def whole_schema(schema: Schema) -> Schema:
    """A definition's schema with what every object has, whether it says so or not."""
    metadata = _expanded("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
    envelope = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata}
    return {**schema, "properties": {**schema.get("properties", {}), **envelope}}


@functools.cache
def definitions() -> dict[str, Any]:
    """The definitions of Kubernetes' own OpenAPI document, with list types, by name."""
    place = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local" / "_definitions.json"
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))["$defs"]
    return found


@functools.cache
def _names() -> dict[tuple[str, str, str], str]:
    """The definition of each kind."""
    return {
        (kind["group"], kind["version"], kind["kind"]): name
        for name, definition in definitions().items()
        for kind in definition.get("x-kubernetes-group-version-kind", ())
    }


@functools.cache
def built_in_schema(group: str, version: str, kind: str) -> Schema:
    """A built-in kind's schema in the form of a definition's."""
    return _expanded(_names()[group, version, kind])


@functools.cache
def _expanded(name: str) -> Schema:
    if name == RECURSIVE:
        return FREE_FORM
    if name in INT_OR_STRING:
        return {"x-kubernetes-int-or-string": True}
    found: Schema = _structural(definitions()[name])
    return found


def _structural(node: Any) -> Any:
    """A part of the document as a structural schema: references followed, and null no type of its own but an absent value."""
    if "$ref" in node:
        own = {key: value for key, value in node.items() if key.startswith("x-kubernetes") or key == "default"}
        return {**_expanded(node["$ref"].rpartition("/")[2]), **own}
    found = {
        key: value for key, value in node.items() if key.startswith("x-kubernetes") or key in ("required", "format", "default", "enum")
    }
    if isinstance(kind := node.get("type"), list):
        found["type"] = next(name for name in kind if name != "null")
    elif kind:
        found["type"] = kind
    if "properties" in node:
        found["properties"] = {key: _structural(value) for key, value in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            found[key] = _structural(node[key])
    if found.get("type") == "object" and not found.keys() & {"properties", "additionalProperties"}:
        found["x-kubernetes-preserve-unknown-fields"] = True
    return found
