"""What a RayJob's status means: one verdict for each state and each reason of failure that KubeRay documents.

Source: KubeRay 1.7, ray-operator/apis/ray/v1/rayjob_types.go (JobDeploymentStatus, JobStatus, JobFailedReason) and the transitions in
ray-operator/controllers/ray/rayjob_controller.go.
"""

from __future__ import annotations

from collections.abc import Callable

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import raycluster_states
from pipelines.cluster.states import Manifest, Verdict, failed, status_of, troubled

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RESUME = "Run the same command again to resume."
REASONS: dict[str, tuple[type[SlipwayError], str, str]] = {
    "SubmissionFailed": (TransientError, "the job could not be handed to its Ray cluster", f"Look at the submitter's log. {RESUME}"),
    "DeadlineExceeded": (
        TransientError,
        "it was not done within rayJob.activeDeadlineSeconds",
        f"Raise them where the work needs longer. {RESUME}",
    ),
    "PreRunningDeadlineExceeded": (
        TransientError,
        "its Ray cluster was not ready within rayJob.preRunningDeadlineSeconds",
        "Look for nodes with room, or raise the deadline; then run the same command again.",
    ),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (TransientError, "KubeRay lost sight of its end", RESUME),
    "JobStatusCheckTimeoutExceeded": (
        TransientError,
        "the dashboard of its Ray cluster did not answer the operator",
        f"Let the operator through to port 8265 of the head (a NetworkPolicy may forbid it). {RESUME}",
    ),
    "ValidationFailed": (ConfigError, "KubeRay refuses it", "Correct the values that the message names."),
    "AppFailed": (SlipwayError, "its program failed", "The log says why."),
}
LOST = ("head pod not found", "job not found", "supervisor actor", "actor died", "node died", "node failure", "connection", "unreachable")
"""Parts of the messages by which Ray and KubeRay tell that the cluster went away, and not that the program failed."""


def verdict(rayjob: Manifest) -> Verdict:
    """What a RayJob as read from the cluster means."""
    status = status_of(rayjob)
    state = str(status.get("jobDeploymentStatus") or "")
    found = TABLE.get(state)
    if found is None:  # of a newer KubeRay
        return Verdict("waiting", f"KubeRay says {state!r}")
    return found(rayjob, status)


def _name(rayjob: Manifest) -> str:
    return f"RayJob {rayjob['metadata']['name']}"


def _new(rayjob: Manifest, status: Manifest) -> Verdict:
    return Verdict("waiting", "KubeRay has not looked at it yet")


def _initializing(rayjob: Manifest, status: Manifest) -> Verdict:
    cluster = status.get("rayClusterStatus") or {}
    refused = raycluster_states.refusal(cluster, _name(rayjob))
    if refused is not None:
        return troubled(refused) if raycluster_states.is_quota(cluster) else failed(refused)
    return Verdict("waiting", raycluster_states.progress(cluster))


def _running(rayjob: Manifest, status: Manifest) -> Verdict:
    job = str(status.get("jobStatus") or "")
    return Verdict("running", "its program runs" if job == "RUNNING" else f"its program is {job or 'handed over'}")


def _suspended(rayjob: Manifest, status: Manifest) -> Verdict:
    queue = (rayjob["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if queue:
        return Verdict("waiting", f"Kueue holds it in the queue {queue}; it goes on from its last checkpoint when there is room")
    return Verdict("waiting", "it is suspended; it goes on from its last checkpoint when spec.suspend is false again")


def _retrying(rayjob: Manifest, status: Manifest) -> Verdict:
    num_tries = (rayjob.get("spec") or {}).get("backoffLimit", 0) + 1
    return Verdict("waiting", f"try {status.get('failed', 1)} of {num_tries} failed{_cause(status)}; KubeRay starts the next one")


def _ready_for_hand(rayjob: Manifest, status: Manifest) -> Verdict:
    message = f"{_name(rayjob)} waits for someone to submit its job by hand (submissionMode InteractiveMode)."
    return failed(ConfigError(f"{message} Use HTTPMode, K8sJobMode or SidecarMode."))


def _complete(rayjob: Manifest, status: Manifest) -> Verdict:
    job = status.get("jobStatus")
    if job == "SUCCEEDED":
        return Verdict("done", "its program ended well")
    if job == "STOPPED":
        return failed(TransientError(f"{_name(rayjob)} was stopped by someone{_cause(status)}. {RESUME}"))
    return _failed(rayjob, {"reason": "AppFailed", **status})


def _failed(rayjob: Manifest, status: Manifest) -> Verdict:
    reason = str(status.get("reason") or "AppFailed")
    kind, what, advice = REASONS.get(reason, (SlipwayError, f"KubeRay says {reason!r}", "Look at the events of the RayJob."))
    message = str(status.get("message") or "")
    if reason == "AppFailed" and any(sign in message.lower() for sign in LOST):
        kind, what, advice = TransientError, "its Ray cluster was lost", RESUME
    tries = f" in {num} tries" if (num := status.get("failed", 1)) > 1 else ""
    return failed(kind(f"{_name(rayjob)} failed{tries}: {what}{_cause(status)}. {advice}"))


def _invalid(rayjob: Manifest, status: Manifest) -> Verdict:
    return _failed(rayjob, {**status, "reason": "ValidationFailed"})


def _cause(status: Manifest) -> str:
    message = str(status.get("message") or "").strip().rstrip(".")
    return f" ({message})" if message else ""


TABLE: dict[str, Callable[[Manifest, Manifest], Verdict]] = {
    "": _new,
    "Scheduling": _new,
    "Scheduled": _new,
    "Initializing": _initializing,
    "Running": _running,
    "Suspending": _suspended,
    "Suspended": _suspended,
    "Retrying": _retrying,
    "Waiting": _ready_for_hand,
    "Complete": _complete,
    "Failed": _failed,
    "ValidationFailed": _invalid,
}
