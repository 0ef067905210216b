"""Waits until what was deployed serves, and tells what keeps it from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from infra.errors import TransientError
from pipelines.cluster.client import Cluster
from pipelines.cluster.inventory import LABEL
from pipelines.cluster.pod_states import trouble_of
from pipelines.cluster.pod_watch import PodWatch
from pipelines.cluster.refs import Ref, ref_of
from pipelines.cluster.rollout import Note
from pipelines.cluster.states import Verdict, failed, troubled
from pipelines.cluster.workload_states import verdict

WAITED_KINDS = ("Deployment", "RayService", "StatefulSet")
POLL_S = 2.0


def wait_ready(cluster: Cluster, deployment: str, manifests: Sequence[dict[str, Any]], timeout_s: float, note: Note) -> None:
    """Returns when every workload of the manifests serves in full.

    Raises the error of the first that failed, or whose pods cannot start; after `timeout_s` that of what it waits for.
    """
    watched = [ref_of(manifest) for manifest in manifests if manifest["kind"] in WAITED_KINDS]
    started_s = time.monotonic()
    said: dict[Ref, str] = {}
    pods = PodWatch(cluster, {LABEL: deployment})
    while True:
        verdicts = {ref: _verdict_of(cluster, ref) for ref in watched}
        for ref, found in verdicts.items():
            if said.get(ref) != found.text:
                said[ref] = found.text
                note(f"  {ref}: {found.text}")
            if found.phase == "failed" and found.error is not None:
                raise found.error
        if all(found.phase == "done" for found in verdicts.values()):
            return
        trouble = pods.lasting()
        if trouble is not None:
            raise trouble.error
        if time.monotonic() - started_s > timeout_s:
            raise _impatient(pods, verdicts, timeout_s)
        time.sleep(POLL_S)


def overview(cluster: Cluster, members: Sequence[dict[str, Any]], deployment: str) -> list[tuple[Ref, Verdict]]:
    """Each object of a deployment with what its state means, and the pods that have trouble."""
    rows = [(ref_of(live), verdict(live)) for live in members]
    for pod in cluster.find("v1", "Pod", {LABEL: deployment}):
        found = trouble_of(pod)
        if found is not None:
            rows.append((ref_of(pod), (troubled if found.hope == "good" else failed)(found.error)))
    return rows


def _verdict_of(cluster: Cluster, ref: Ref) -> Verdict:
    live = cluster.get(ref)
    return Verdict("waiting", "it is not there") if live is None else verdict(live)


def _impatient(pods: PodWatch, verdicts: dict[Ref, Verdict], timeout_s: float) -> Exception:
    trouble = pods.worst()
    ref, first = next((ref, found) for ref, found in verdicts.items() if found.phase != "done")
    if first.error is not None:
        return first.error
    if trouble is not None:
        return trouble.error
    message = f"{ref} is not ready after {timeout_s:.0f} s: {first.text}. Everything is applied and goes on by itself"
    return TransientError(f"{message}; look at `slipway status` and `slipway logs`, or go back by `slipway rollback`.")
