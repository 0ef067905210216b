"""What the status of the cluster's own kinds means; of the Ray kinds too, by their own modules: `verdict` takes any object.

Sources: the Deployment, Job and PersistentVolumeClaim pages of kubernetes.io/docs/concepts, HorizontalPodAutoscaler's and HTTPRoute's API.
"""

from __future__ import annotations

from collections.abc import Callable

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import rayjob_states, rayservice_states
from pipelines.cluster.raycluster_states import REFUSALS
from pipelines.cluster.states import Manifest, Verdict, condition, failed, holds, is_current, label, status_of, troubled

JOB_REASONS = {
    "BackoffLimitExceeded": "its pods failed more often than backoffLimit allows",
    "DeadlineExceeded": "it was not done within activeDeadlineSeconds",
    "PodFailurePolicy": "a pod failed in a way that its podFailurePolicy does not try again",
    "FailedIndexes": "some of its indexes failed",
    "MaxFailedIndexesExceeded": "more of its indexes failed than maxFailedIndexes allows",
}


def verdict(manifest: Manifest) -> Verdict:
    """What an object as read from the cluster means; kinds without a state are done when they are there."""
    judge = JUDGES.get(str(manifest.get("kind")))
    return Verdict("done", "it is there") if judge is None else judge(manifest)


def _deployment(manifest: Manifest) -> Verdict:
    status, wanted = status_of(manifest), (manifest.get("spec") or {}).get("replicas", 1)
    if not is_current(manifest) or not status:
        return Verdict("waiting", "its controller has not looked at it yet")
    progressing, failure = condition(manifest, "Progressing"), condition(manifest, "ReplicaFailure")
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        text = f"{label(manifest)} did not come up within progressDeadlineSeconds ({progressing.get('message')})."
        return failed(TransientError(f"{text} Look at its pods and at slipway logs."))
    if failure.get("status") == "True":
        message = str(failure.get("message") or "")
        advice = next((text for sign, text in REFUSALS.items() if sign in message), "Look at its events.")
        return troubled(ConfigError(f"{label(manifest)}: its pods could not be made ({message.rstrip('.')}). {advice}"))
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    if status.get("replicas", 0) > updated:
        return Verdict("running", f"{updated} of {wanted} pods are of the new version")
    if min(updated, available) < wanted:
        return Verdict("waiting", f"{available} of {wanted} pods are available")
    return Verdict("done", f"{available} of {wanted} pods are available")


def _stateful_set(manifest: Manifest) -> Verdict:
    status, wanted = status_of(manifest), (manifest.get("spec") or {}).get("replicas", 1)
    ready = status.get("readyReplicas", 0)
    is_done = is_current(manifest) and ready >= wanted and status.get("updatedReplicas", ready) >= wanted
    return Verdict("done" if is_done else "waiting", f"{ready} of {wanted} pods are ready")


def _job(manifest: Manifest) -> Verdict:
    ended = condition(manifest, "Failed")
    if ended.get("status") == "True":
        reason = str(ended.get("reason") or "")
        what = JOB_REASONS.get(reason, reason or "it failed")
        kind = TransientError if reason == "DeadlineExceeded" else SlipwayError
        return failed(kind(f"{label(manifest)} failed: {what} ({ended.get('message')}). Its pods' log says more: slipway logs."))
    if holds(manifest, "Complete"):
        return Verdict("done", "it ended well")
    if (manifest.get("spec") or {}).get("suspend"):
        return Verdict("waiting", "it is suspended")
    active = status_of(manifest).get("active", 0)
    return Verdict("running" if active else "waiting", f"{active} of its pods run")


def _claim(manifest: Manifest) -> Verdict:
    phase = str(status_of(manifest).get("phase") or "Pending")
    if phase == "Lost":
        return failed(ConfigError(f"{label(manifest)} lost its volume. Restore it from a backup; a new claim begins empty."))
    # A claim of a class that waits for its first pod is pending until then, and no trouble.
    return Verdict("done" if phase == "Bound" else "waiting", f"its volume is {phase}")


def _scaler(manifest: Manifest) -> Verdict:
    active = condition(manifest, "ScalingActive")
    if active.get("status") == "False" and active.get("reason") != "ScalingDisabled":
        return troubled(TransientError(f"{label(manifest)} cannot read its metrics ({active.get('message')}). Look at the metrics server."))
    current, most = status_of(manifest).get("currentReplicas", 0), (manifest.get("spec") or {}).get("maxReplicas")
    return Verdict("done", f"{current} of at most {most} replicas")


def _route(manifest: Manifest) -> Verdict:
    parents = status_of(manifest).get("parents") or ()
    for parent in parents:
        for each in parent.get("conditions") or ():
            if each.get("type") in ("Accepted", "ResolvedRefs") and each.get("status") == "False":
                cause = f"{each.get('reason')} ({each.get('message')})"
                return troubled(ConfigError(f"{label(manifest)}: its gateway does not take it: {cause}. Correct the gateway's values."))
    return Verdict("done", "its gateway took it") if parents else Verdict("waiting", "no gateway has taken it yet")


def _cron_job(manifest: Manifest) -> Verdict:
    spec, status = manifest.get("spec") or {}, status_of(manifest)
    if spec.get("suspend"):
        return Verdict("done", "it is suspended")
    last = status.get("lastScheduleTime")
    return Verdict("done", f"at {spec.get('schedule')}" + (f", last {last}" if last else ""))


JUDGES: dict[str, Callable[[Manifest], Verdict]] = {
    "CronJob": _cron_job,
    "Deployment": _deployment,
    "HTTPRoute": _route,
    "HorizontalPodAutoscaler": _scaler,
    "Job": _job,
    "PersistentVolumeClaim": _claim,
    "RayJob": rayjob_states.verdict,
    "RayService": rayservice_states.verdict,
    "StatefulSet": _stateful_set,
}
