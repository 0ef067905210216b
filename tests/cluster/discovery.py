"""What a server says of itself: its version, its groups, and the kinds of each version."""

from __future__ import annotations

from typing import Any

from tests.cluster.kinds import KUBERNETES, Kind, Kinds

SHORT_NAMES = {
    "ConfigMap": ["cm"], "CronJob": ["cj"], "CustomResourceDefinition": ["crd"], "DaemonSet": ["ds"], "Deployment": ["deploy"],
    "HorizontalPodAutoscaler": ["hpa"], "Ingress": ["ing"], "Namespace": ["ns"], "NetworkPolicy": ["netpol"], "Node": ["no"],
    "PersistentVolume": ["pv"], "PersistentVolumeClaim": ["pvc"], "Pod": ["po"], "PodDisruptionBudget": ["pdb"], "ReplicaSet": ["rs"],
    "ServiceAccount": ["sa"], "Service": ["svc"], "StatefulSet": ["sts"],
}  # fmt: skip
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


def answer(kinds: Kinds, path: str) -> dict[str, Any] | None:
    """The body for a path of discovery, or None where it is none."""
    parts = [part for part in path.split("/") if part]
    if parts == ["version"]:
        major, minor, _ = KUBERNETES.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES}", "platform": "linux/amd64"}
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(kinds, name) for name in _groups(kinds)]}
    if len(parts) == 2 and parts[0] == "apis" and parts[1] in _groups(kinds):
        return {"kind": "APIGroup", "apiVersion": "v1", **_group(kinds, parts[1])}
    if parts[:2] == ["openapi", "v3"]:
        return _openapi(kinds, "/".join(parts[2:]))
    found = [kind for kind in kinds if parts == (["apis", kind.group, kind.version] if kind.group else ["api", kind.version])]
    return _resources(found) if found else None


def _groups(kinds: Kinds) -> list[str]:
    return sorted({kind.group for kind in kinds if kind.group})


def _group(kinds: Kinds, name: str) -> dict[str, Any]:
    versions = sorted({kind.version for kind in kinds if kind.group == name})
    shown = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": shown, "preferredVersion": shown[0]}


def _resources(kinds: list[Kind]) -> dict[str, Any]:
    resources = []
    for kind in kinds:
        entry: dict[str, Any] = {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.is_namespaced,
            "kind": kind.kind,
        }
        resources.append({**entry, "verbs": VERBS, "shortNames": SHORT_NAMES.get(kind.kind, [])})
        if kind.has_status:
            resources.append({**entry, "name": f"{kind.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]})
        if kind.api_version == "v1" and kind.kind == "Pod":
            resources.append({**entry, "name": "pods/log", "singularName": "", "verbs": ["get"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": kinds[0].api_version, "resources": resources}


def _openapi(kinds: Kinds, path: str) -> dict[str, Any] | None:
    """The OpenAPI documents, no more than by which kubectl and Helm see that the server itself checks fields: no client does it twice."""
    found = {_prefix(kind): [other for other in kinds if _prefix(other) == _prefix(kind)] for kind in kinds}
    if not path:
        return {"paths": {prefix: {"serverRelativeURL": f"/openapi/v3/{prefix}?hash={KUBERNETES}"} for prefix in found}}
    if path not in found:
        return None
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldManager", "fieldValidation")]
    paths = {}
    for kind in found[path]:
        inside = "/namespaces/{namespace}" if kind.is_namespaced else ""
        shown = {"group": kind.group, "version": kind.version, "kind": kind.kind}
        patch = {"x-kubernetes-action": "patch", "x-kubernetes-group-version-kind": shown, "parameters": parameters, "responses": {}}
        paths[f"/{path}{inside}/{kind.plural}/{{name}}"] = {"patch": patch, "parameters": []}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": KUBERNETES}, "paths": paths, "components": {"schemas": {}}}


def _prefix(kind: Kind) -> str:
    return f"apis/{kind.api_version}" if kind.group else f"api/{kind.api_version}"
