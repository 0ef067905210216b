"""Follows a RayJob to its end, or to a result of its program that no further try would change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from infra.errors import EXIT_DONE, TransientError
from infra.orders import Result
from infra.process import Progress
from pipelines.cluster.client import Cluster
from pipelines.cluster.pod_watch import PodWatch
from pipelines.cluster.rayjob_states import QUEUE_LABEL, verdict
from pipelines.cluster.refs import Ref
from pipelines.cluster.states import Verdict, failed, status_of
from pipelines.cluster.watch import watch_one
from pipelines.executors.shipping import Shipment

log = logging.getLogger(__name__)
TICK_S = 0.25
STORE_S = 2.0
PODS_S = 10.0
OPERATOR_S = 180.0
"""How long a RayJob may be there before its operator has looked at it."""


@dataclass
class _Clock:
    """When something was last done."""

    every_s: float
    last_s: float = 0.0

    def is_due(self) -> bool:
        """Whether it is time again; if so, it counts as done now."""
        now_s = time.monotonic()
        if now_s - self.last_s < self.every_s:
            return False
        self.last_s = now_s
        return True


def follow(cluster: Cluster, ref: Ref, shipment: Shipment, pods: PodWatch, on_tick: Callable[[], None]) -> Verdict:
    """How the RayJob ended; `done` also where its program has left a result that is final. Calls `on_tick` several times a second."""
    started_s = time.monotonic()
    store_clock, pods_clock = _Clock(STORE_S), _Clock(PODS_S, started_s)
    found, before = Verdict("waiting", ""), ""
    live = None
    for event in watch_one(cluster, ref, idle_s=TICK_S):
        if (event is not None and event.state == "gone") or (event is None and live is None and cluster.get(ref) is None):
            return failed(TransientError(f"{ref} was deleted by someone. Run the same command again to resume."))
        if event is not None:
            live, found = event.live, verdict(event.live)
            if found.text != before:
                _tell(shipment, ref, found)
            if found.phase in ("done", "failed"):
                return found
        if store_clock.is_due() or found.text != before:  # before KubeRay tries again what would end the same way
            shipment.follow()
            if is_final(shipment.result()):
                return Verdict("done", "its program has left its result")
        before = found.text
        on_tick()
        if found.phase in ("waiting", "troubled") and pods_clock.is_due() and (trouble := pods.lasting()) is not None:
            return failed(trouble.error)
        if _is_ignored(live, started_s):
            advice = "Is KubeRay's operator running, and does it watch this namespace? Then run the same command again."
            return failed(TransientError(f"{ref} has been there for {OPERATOR_S:.0f} s and nobody has looked at it. {advice}"))
    raise AssertionError("unreachable: a watch never ends by itself")


def _tell(shipment: Shipment, ref: Ref, found: Verdict) -> None:
    """Shows how far the RayJob is where the program's own progress is shown, which takes its place as soon as there is some."""
    log.info("%s: %s", ref, found.text)
    if found.phase not in ("done", "failed"):
        Progress(shipment.job.progress_file, "").report(0, 1, cluster=found.text)


def is_final(result: Result | None) -> bool:
    """Whether no further try of KubeRay would change the result: it is good, or the error is one that stays."""
    if result is None:
        return False
    error = None if result.error is None else result.error.as_error()
    return result.exit_code == EXIT_DONE or (error is not None and not isinstance(error, TransientError))


def _is_ignored(live: dict[str, object] | None, started_s: float) -> bool:
    """Whether the operator has not looked at it for too long; a queue, or another cluster that it is for, may take its time."""
    if time.monotonic() - started_s < OPERATOR_S:
        return False
    if live is None:
        return True
    metadata, spec = live["metadata"], live.get("spec") or {}
    is_for_others = QUEUE_LABEL in (metadata.get("labels") or {}) or bool(spec.get("managedBy"))  # type: ignore[attr-defined]
    return not status_of(live) and not is_for_others
