"""Tells when pods' troubles have lasted for longer than they may."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pipelines.cluster.client import Cluster
from pipelines.cluster.pod_states import Hope, Trouble, trouble_of, worst

# Pods of the state before are told apart by nothing but that they go, and a registry may have hiccups.
GRACE_S: Mapping[Hope, float] = MappingProxyType({"none": 15.0, "little": 90.0})


@dataclass
class PodWatch:
    """The troubles of the pods with some labels, and since when they last."""

    cluster: Cluster
    labels: Mapping[str, str]
    grace_s: Mapping[Hope, float] = field(default_factory=lambda: GRACE_S)
    since_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def lasting(self) -> Trouble | None:
        """The trouble that has lasted for longer than it may, or None. One that will pass is never one."""
        now_s = time.monotonic()
        current: dict[tuple[str, str], Trouble] = {}
        for pod in self.cluster.find("v1", "Pod", self.labels):
            found = None if pod["metadata"].get("deletionTimestamp") else trouble_of(pod)
            if found is not None and found.hope in self.grace_s:
                current[str(pod["metadata"]["uid"]), found.hope] = found
        self.since_s = {key: self.since_s.get(key, now_s) for key in current}
        return next((found for key, found in current.items() if now_s - self.since_s[key] >= self.grace_s[found.hope]), None)

    def worst(self) -> Trouble | None:
        """What explains most of what is wrong now."""
        return worst(self.cluster.find("v1", "Pod", self.labels))
