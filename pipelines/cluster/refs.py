"""The name of an object of a cluster, and the order in which objects need each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import ConfigError

# Each kind after those that it may need at once; a kind that is not named comes after all of them, where custom resources belong.
INSTALL_ORDER = (
    "Namespace", "CustomResourceDefinition", "PriorityClass", "ResourceQuota", "LimitRange", "NetworkPolicy", "ServiceAccount", "Secret",
    "ConfigMap", "StorageClass", "PersistentVolume", "PersistentVolumeClaim", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
    "Service", "PodDisruptionBudget", "Pod", "Deployment", "StatefulSet", "DaemonSet", "HorizontalPodAutoscaler", "Job", "CronJob",
    "Ingress",
)  # fmt: skip
RANKS = {kind: rank for rank, kind in enumerate(INSTALL_ORDER)}


@dataclass(frozen=True, order=True)
class Ref:
    """Which object is meant; `namespace` is None where the kind has none, or where the client's own is meant."""

    api_version: str
    kind: str
    name: str
    namespace: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


def ref_of(manifest: Mapping[str, Any]) -> Ref:
    """The name of a manifest's object. Raises ConfigError where it has none."""
    metadata = manifest.get("metadata") or {}
    found = (manifest.get("apiVersion"), manifest.get("kind"), metadata.get("name"))
    if not all(isinstance(part, str) and part for part in found):
        raise ConfigError(
            f"a manifest has apiVersion {found[0]!r}, kind {found[1]!r} and metadata.name {found[2]!r}; all three are needed."
        )
    return Ref(str(found[0]), str(found[1]), str(found[2]), metadata.get("namespace"))


def in_install_order(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifests, those first that others need; the reverse is the order to delete them in."""
    return sorted(manifests, key=lambda each: RANKS.get(str(each.get("kind")), len(RANKS)))


def selector(labels: Mapping[str, str]) -> str:
    """The labels as a query wants them, `a=b,c=d`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
