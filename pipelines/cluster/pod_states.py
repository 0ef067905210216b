"""What keeps a pod from running, or ended it: one typed error for each state that Kubernetes documents.

Sources: kubernetes.io/docs/concepts: workloads/pods/pod-lifecycle, workloads/pods/disruptions (pod disruption conditions) and
scheduling-eviction/node-pressure-eviction; kubelet's reasons of waiting
containers in pkg/kubelet/images/types.go and pkg/kubelet/container/sync_result.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster.states import Manifest, condition, status_of

Hope = Literal["none", "little", "good"]
"""Whether it passes by itself: `none`, `little` (a registry may have hiccups), or `good` (a node may come)."""

IMAGE = "Look whether the image and its tag are right and whether imagePullSecrets let the cluster pull it."
REFERENCE = "Make the Secret or ConfigMap that it names, or correct its name in the values."
COMMAND = "Look at the image's entry point and at the security context; the pod's events say more."
WAITING: dict[str, tuple[type[SlipwayError], Hope, str]] = {
    "ErrImagePull": (ConfigError, "little", IMAGE),
    "ImagePullBackOff": (ConfigError, "little", IMAGE),
    "InvalidImageName": (ConfigError, "none", "Correct image.repository, image.tag or image.digest in the values."),
    "ErrImageNeverPull": (ConfigError, "none", "Load the image onto the nodes, or set image.pullPolicy to IfNotPresent."),
    "SignatureValidationFailed": (ConfigError, "none", "The cluster takes signed images only. Sign the image, or name one that is."),
    "ImageInspectError": (TransientError, "little", "The node's image store may be damaged; let another node run it."),
    "RegistryUnavailable": (TransientError, "good", "The registry does not answer; wait for it."),
    "CreateContainerConfigError": (ConfigError, "little", REFERENCE),
    "CreateContainerError": (ConfigError, "little", COMMAND),
    "RunContainerError": (ConfigError, "little", COMMAND),
    "PreCreateHookError": (SlipwayError, "little", "The pod's events say more."),
    "PreStartHookError": (SlipwayError, "little", "The pod's events say more."),
    "PostStartHookError": (SlipwayError, "little", "The pod's events say more."),
}
NODE = "Nothing is wrong with the job; run the same command again to resume."
ENDED: dict[str, str] = {
    "Evicted": "Ask for what it really uses in resources.requests (memory, ephemeral-storage), then run the same command again to resume.",
    "NodeLost": NODE,
    "NodeShutdown": NODE,
    "Shutdown": NODE,
    "Terminated": NODE,
    "Preempting": "Give it a priorityClassName that is not the lowest, or run it when the cluster is emptier.",
    "NodeAffinity": NODE,
    "OutOfcpu": NODE,
    "OutOfmemory": NODE,
    "OutOfpods": NODE,
    "UnexpectedAdmissionError": "The node refused it, often as a device plugin was not ready; run the same command again.",
    "TopologyAffinityError": "The node could not align its devices; run the same command again.",
    "DeadlineExceeded": "Its activeDeadlineSeconds are over. Raise them in the values, and run the same command again to resume.",
}
DISRUPTIONS: dict[str, str] = {
    "PreemptionByScheduler": ENDED["Preempting"],
    "DeletionByTaintManager": NODE,
    "EvictionByEvictionAPI": NODE,
    "DeletionByPodGC": NODE,
    "TerminationByKubelet": NODE,
}


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not run."""

    error: SlipwayError
    hope: Hope


def worst(pods: Iterable[Manifest]) -> Trouble | None:
    """The trouble among the pods that explains most: those without hope first."""
    found = [trouble for pod in pods if (trouble := trouble_of(pod)) is not None]
    return min(found, key=lambda trouble: ("none", "little", "good").index(trouble.hope), default=None)


def trouble_of(pod: Manifest) -> Trouble | None:
    """What is wrong with a pod, or None. A container that ended well, or a pod that still starts, is no trouble."""
    return _of_memory(pod) or _of_pod(pod) or _of_containers(pod) or _of_scheduling(pod)


def _of_memory(pod: Manifest) -> Trouble | None:
    """First: what follows from a container killed for memory (evictions, crash loops, lost workers) is told by that."""
    for name, state in _terminations(pod):
        if state.get("reason") == "OOMKilled":
            message = f"{_named(pod, name)} was killed: it used more than its memory limit. Raise resources.limits.memory of its group"
            is_back = any("running" in (status.get("state") or {}) for other, status in _containers(pod) if other == name)
            return Trouble(
                ConfigError(f"{message}, or give it less to do at once (a smaller batch, fewer requests)."), "good" if is_back else "none"
            )
    return None


def _of_pod(pod: Manifest) -> Trouble | None:
    status = status_of(pod)
    disruption = condition(pod, "DisruptionTarget")
    if disruption.get("status") == "True":
        reason = str(disruption.get("reason"))
        return _lost(pod, reason, disruption.get("message"), DISRUPTIONS.get(reason, NODE))
    reason = str(status.get("reason") or "")
    if status.get("phase") == "Failed" and reason in ENDED:
        return _lost(pod, reason, status.get("message"), ENDED[reason])
    if status.get("phase") == "Unknown":
        return _lost(pod, "Unknown", "its node does not answer", NODE)
    return None


def _lost(pod: Manifest, reason: str, message: object, advice: str) -> Trouble:
    return Trouble(TransientError(f"pod {_name(pod)} was ended by the cluster: {reason}{_because(message)}. {advice}"), "good")


def _of_containers(pod: Manifest) -> Trouble | None:
    for name, status in _containers(pod):
        waiting = (status.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason == "CrashLoopBackOff":
            return _crashed(pod, name, (status.get("lastState") or {}).get("terminated") or {})
        if reason in WAITING:
            kind, hope, advice = WAITING[reason]
            return Trouble(kind(f"{_named(pod, name)} does not start: {reason}{_because(waiting.get('message'))}. {advice}"), hope)
    for name, state in _terminations(pod):
        if state.get("reason") == "ContainerStatusUnknown":
            return _lost(pod, "ContainerStatusUnknown", state.get("message"), NODE)
        if state.get("reason") in ("ContainerCannotRun", "StartError"):
            cause = f"{state['reason']}{_because(state.get('message'))}"
            return Trouble(ConfigError(f"{_named(pod, name)} cannot run: {cause}. {COMMAND}"), "none")
    return None


def _crashed(pod: Manifest, name: str, last: Manifest) -> Trouble:
    cause = f"exit code {last.get('exitCode', 'unknown')}{_because(last.get('message'))}"
    text = f"{_named(pod, name)} ends again and again ({cause}). Its log says why: kubectl logs {_name(pod)} -c {name} --previous"
    return Trouble(SlipwayError(text), "little")


def _of_scheduling(pod: Manifest) -> Trouble | None:
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    if scheduled.get("reason") == "SchedulingGated":
        return Trouble(
            TransientError(f"pod {_name(pod)} is held back by a scheduling gate. Its queue lets it go when there is room."), "good"
        )
    advice = "Wait for a node, or ask for less in resources; look at nodeSelector and tolerations."
    return Trouble(TransientError(f"pod {_name(pod)} finds no node{_because(scheduled.get('message'))}. {advice}"), "good")


def _containers(pod: Manifest) -> Iterator[tuple[str, Manifest]]:
    status = status_of(pod)
    for key in ("initContainerStatuses", "containerStatuses"):
        for each in status.get(key) or ():
            yield each["name"], each


def _terminations(pod: Manifest) -> Iterator[tuple[str, Manifest]]:
    """How containers ended: now, or the last time before they were started again."""
    for name, status in _containers(pod):
        for key in ("state", "lastState"):
            if ended := (status.get(key) or {}).get("terminated"):
                yield name, ended


def _name(pod: Manifest) -> str:
    return str(pod["metadata"]["name"])


def _named(pod: Manifest, container: str) -> str:
    return f"container {container} of pod {_name(pod)}"


def _because(message: object) -> str:
    return f" ({str(message).strip().rstrip('.')})" if message else ""
