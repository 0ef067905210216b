"""Why a Ray cluster is not ready, from its status as KubeRay writes it.

Source: KubeRay's RayClusterStatus (ray-operator/apis/ray/v1/raycluster_types.go): conditions HeadPodReady, RayClusterProvisioned,
ReplicaFailure, RayClusterSuspending and RayClusterSuspended, and the older field `state`.
"""

from __future__ import annotations

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster.states import Manifest

REFUSALS = {
    "violates PodSecurity": "Keep the chart's securityContext, or label the namespace for what you need.",
    "exceeded quota": "Ask for less in resources, or have the quota of the namespace raised.",
    "denied the request": "A policy of the cluster refused the pod; its message says what to change in the values.",
    "serviceaccount": "Make the service account, or correct serviceAccount.name in the values.",
    "is forbidden": "The pod may not be made as it is; the message says what to change in the values.",
    "is invalid": "The pod is not valid; correct the values that the message names.",
}


def refusal(status: Manifest, subject: str) -> SlipwayError | None:
    """The error where the cluster refused to make the Ray cluster's pods: nothing will run until it is put right, a quota apart."""
    failure = _condition(status, "ReplicaFailure")
    if failure.get("status") != "True":
        return None
    message = str(failure.get("message") or "")
    advice = next((text for sign, text in REFUSALS.items() if sign in message), "Look at the events of the Ray cluster.")
    kind = TransientError if is_quota(status) else ConfigError
    return kind(f"{subject}: its pods could not be made: {failure.get('reason')} ({message.strip().rstrip('.')}). {advice}")


def is_quota(status: Manifest) -> bool:
    """Whether the refusal is one that passes when others finish."""
    return "exceeded quota" in str(_condition(status, "ReplicaFailure").get("message") or "")


def progress(status: Manifest) -> str:
    """How far the Ray cluster is, in words."""
    if not status:
        return "its Ray cluster is being made"
    head = _condition(status, "HeadPodReady")
    if head and head.get("status") != "True":
        return f"the head of its Ray cluster is not ready: {head.get('reason')}{_tail(head.get('message'))}"
    ready, wanted = status.get("availableWorkerReplicas", 0), status.get("desiredWorkerReplicas", 0)
    if ready < wanted:
        return f"{ready} of {wanted} workers of its Ray cluster are there"
    return "its Ray cluster is ready" if status.get("state") == "ready" else "its Ray cluster starts"


def _condition(status: Manifest, kind: str) -> Manifest:
    return next((each for each in status.get("conditions") or () if each.get("type") == kind), {})


def _tail(message: object) -> str:
    return f" ({message})" if message else ""
