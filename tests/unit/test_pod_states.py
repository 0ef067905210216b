"""Every state that Kubernetes documents for pods and the built-in kinds that we make, and what a waiting driver makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import pod_states, workload_states
from tests.unit.test_ray_states import raised, told


def pod(*states: dict[str, Any], last: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    containers = [{"name": f"c{number}", "state": state, "lastState": last or {}} for number, state in enumerate(states)]
    return {"kind": "Pod", "metadata": {"name": "p"}, "status": {"containerStatuses": containers, **status}}


RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
OOM = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


@pytest.mark.parametrize(
    ("reason", "error", "hope"),
    [
        ("ErrImagePull", ConfigError, "little"),
        ("ImagePullBackOff", ConfigError, "little"),
        ("InvalidImageName", ConfigError, "none"),
        ("ErrImageNeverPull", ConfigError, "none"),
        ("SignatureValidationFailed", ConfigError, "none"),
        ("ImageInspectError", TransientError, "little"),
        ("RegistryUnavailable", TransientError, "good"),
        ("CreateContainerConfigError", ConfigError, "little"),
        ("CreateContainerError", ConfigError, "little"),
        ("RunContainerError", ConfigError, "little"),
        ("PreCreateHookError", SlipwayError, "little"),
        ("PreStartHookError", SlipwayError, "little"),
        ("PostStartHookError", SlipwayError, "little"),
        ("CrashLoopBackOff", SlipwayError, "little"),
    ],
)
@pytest.mark.parametrize("where", ["containerStatuses", "initContainerStatuses"])
def test_container_that_does_not_start_is_told_by_its_reason(reason: str, error: type[SlipwayError], hope: str, where: str) -> None:
    waiting = {"name": "main", "state": {"waiting": {"reason": reason, "message": "the very cause."}}}
    waiting["lastState"] = {"terminated": {"exitCode": 3, "message": "the very cause."}}
    trouble = pod_states.trouble_of({"metadata": {"name": "p"}, "status": {where: [waiting]}})
    assert trouble is not None
    assert (type(trouble.error), trouble.hope) == (error, hope)
    assert "container main of pod p" in trouble.error.message
    assert "the very cause" in trouble.error.message


@pytest.mark.parametrize(
    ("found", "error", "hope"),
    [
        (pod(OOM, phase="Failed"), ConfigError, "none"),
        (pod({"waiting": {"reason": "CrashLoopBackOff"}}, last=OOM), ConfigError, "none"),
        (pod(RUNNING, last=OOM), ConfigError, "good"),
        (pod({"terminated": {"exitCode": 128, "reason": "ContainerCannotRun"}}), ConfigError, "none"),
        (pod({"terminated": {"exitCode": 128, "reason": "StartError"}}), ConfigError, "none"),
        (pod({"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}), TransientError, "good"),
        (pod(phase="Unknown"), TransientError, "good"),
        *((pod(phase="Failed", reason=reason), TransientError, "good") for reason in pod_states.ENDED),
        *((pod(conditions=[told("DisruptionTarget", "True", reason)]), TransientError, "good") for reason in pod_states.DISRUPTIONS),
        (pod(conditions=[told("PodScheduled", "False", "Unschedulable", "0/3 nodes")], phase="Pending"), TransientError, "good"),
        (pod(conditions=[told("PodScheduled", "False", "SchedulingGated")], phase="Pending"), TransientError, "good"),
    ],
)
def test_pod_that_was_ended_or_finds_no_node_is_told(found: dict[str, Any], error: type[SlipwayError], hope: str) -> None:
    trouble = pod_states.trouble_of(found)
    assert trouble is not None
    assert (type(trouble.error), trouble.hope) == (error, hope)


@pytest.mark.parametrize(
    "healthy",
    [
        pod(RUNNING, phase="Running"),
        pod({"waiting": {"reason": "ContainerCreating"}}, phase="Pending"),
        pod({"waiting": {"reason": "PodInitializing"}}, phase="Pending"),
        pod({"terminated": {"exitCode": 0, "reason": "Completed"}}, phase="Succeeded"),
        pod({"terminated": {"exitCode": 1, "reason": "Error"}}, phase="Failed"),  # its owner tells that: a program that failed
        {"metadata": {"name": "p"}},
    ],
)
def test_pod_that_starts_runs_or_ended_by_itself_is_no_trouble(healthy: dict[str, Any]) -> None:
    assert pod_states.trouble_of(healthy) is None


def test_worst_trouble_is_the_one_that_does_not_pass() -> None:
    unscheduled = pod(conditions=[told("PodScheduled", "False", "Unschedulable")])
    found = pod_states.worst([pod(RUNNING), unscheduled, pod(OOM)])
    assert found is not None
    assert "memory limit" in found.error.message
    assert pod_states.worst([pod(RUNNING)]) is None


def workload(kind: str, spec: dict[str, Any] | None = None, generation: int = 1, **status: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": "w", "generation": generation}, "spec": spec or {}, "status": status}


def deployment(replicas: int = 2, generation: int = 1, **status: Any) -> dict[str, Any]:
    return workload("Deployment", {"replicas": replicas}, generation, observedGeneration=1, **status)


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (deployment(replicas=2, updatedReplicas=2, availableReplicas=2), ("done", None)),
        (deployment(replicas=0), ("done", None)),
        (deployment(updatedReplicas=2, availableReplicas=1), ("waiting", None)),
        (workload("Deployment", {"replicas": 2}, replicas=3, updatedReplicas=1, availableReplicas=3), ("running", None)),
        (deployment(generation=2, updatedReplicas=2, availableReplicas=2), ("waiting", None)),
        (deployment(conditions=[told("Progressing", "False", "ProgressDeadlineExceeded")]), ("failed", TransientError)),
        (deployment(conditions=[told("ReplicaFailure", "True", "FailedCreate", "exceeded quota")]), ("troubled", ConfigError)),
        (workload("StatefulSet", {"replicas": 1}, readyReplicas=1), ("done", None)),
        (workload("StatefulSet", {"replicas": 1}), ("waiting", None)),
        (workload("Job", conditions=[told("Complete", "True", "x")]), ("done", None)),
        (workload("Job", active=1), ("running", None)),
        (workload("Job", {"suspend": True}), ("waiting", None)),
        (workload("Job", conditions=[told("Failed", "True", "DeadlineExceeded")]), ("failed", TransientError)),
        *(
            (workload("Job", conditions=[told("Failed", "True", reason)]), ("failed", SlipwayError))
            for reason in ("BackoffLimitExceeded", "PodFailurePolicy", "FailedIndexes", "MaxFailedIndexesExceeded")
        ),
        (workload("PersistentVolumeClaim", phase="Bound"), ("done", None)),
        (workload("PersistentVolumeClaim", phase="Pending"), ("waiting", None)),
        (workload("PersistentVolumeClaim", phase="Lost"), ("failed", ConfigError)),
        (workload("HorizontalPodAutoscaler", conditions=[told("ScalingActive", "False", "FailedGetMetric")]), ("troubled", TransientError)),
        (workload("HorizontalPodAutoscaler", conditions=[told("ScalingActive", "False", "ScalingDisabled")]), ("done", None)),
        (workload("HTTPRoute", parents=[{"conditions": [told("Accepted", "True", "Accepted")]}]), ("done", None)),
        (workload("HTTPRoute", parents=[{"conditions": [told("ResolvedRefs", "False", "BackendNotFound")]}]), ("troubled", ConfigError)),
        (workload("HTTPRoute"), ("waiting", None)),
        (workload("CronJob", {"schedule": "0 3 * * *"}), ("done", None)),
        (workload("ConfigMap"), ("done", None)),
    ],
)
def test_state_of_a_builtin_kind_is_told(found: dict[str, Any], outcome: tuple[str, type[SlipwayError] | None]) -> None:
    assert raised(workload_states.verdict(found)) == outcome
