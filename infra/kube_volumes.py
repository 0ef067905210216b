"""Volumes that outlive the pods of a chart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.kube import KubeModel
from infra.kube_types import DottedName, OptionalName, Quantity


class Storage(KubeModel):
    """A volume that outlives its pods."""

    existing_claim: OptionalName = ""
    """PersistentVolumeClaim that exists already; empty means that the chart makes one."""
    size: Quantity = "10Gi"
    """Room on it."""
    storage_class_name: str = ""
    """Empty means the cluster's default."""
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]] = Field(["ReadWriteOnce"], min_length=1)
    """How many nodes may mount it."""


class MountedClaim(KubeModel):
    """A volume with datasets, base models or a cache, in driver and jobs alike."""

    existing_claim: DottedName
    """PersistentVolumeClaim that exists already."""
    path: str = Field(pattern=r"^(/[A-Za-z0-9._-]+)+$")
    """Where it is mounted."""
    read_only: bool = True
    """Whether it is only read."""
