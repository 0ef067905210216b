"""What a server says of itself: its version, its groups, and the kinds of each version."""

from __future__ import annotations

from typing import Any

from tests.cluster.kinds import KUBERNETES, Kind, Kinds

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
        entry = {"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": kind.is_namespaced, "kind": kind.kind}
        resources.append({**entry, "verbs": VERBS})
        if kind.has_status:
            resources.append({**entry, "name": f"{kind.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]})
        if kind.api_version == "v1" and kind.kind == "Pod":
            resources.append({**entry, "name": "pods/log", "singularName": "", "verbs": ["get"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": kinds[0].api_version, "resources": resources}
