"""Every state that KubeRay documents for what we make, and what a waiting driver makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import rayjob_states, rayservice_states, workload_states
from pipelines.cluster.states import Verdict
from tests.charts.crds import admit, custom_kinds
from tests.cluster.kuberay import NEEDS_KUBERAY, ray_definitions


def rayjob(spec: dict[str, Any] | None = None, labels: dict[str, str] | None = None, **status: Any) -> dict[str, Any]:
    return {"kind": "RayJob", "metadata": {"name": "train", "labels": labels or {}}, "spec": spec or {}, "status": status}


def cluster(kind: str, status: str, reason: str, message: str = "", **counts: Any) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": status, "reason": reason, "message": message}], **counts}


def raised(verdict: Verdict) -> tuple[str, type[SlipwayError] | None]:
    return verdict.phase, type(verdict.error) if verdict.error else None


GOOD_STATES: list[tuple[dict[str, Any], str]] = [
    ({}, "waiting"),
    ({"jobDeploymentStatus": ""}, "waiting"),
    ({"jobDeploymentStatus": "Initializing"}, "waiting"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, "running"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running"),
    # Ray says that it ended before KubeRay has seen its submitter end: not over yet.
    ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, "running"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, "running"),
    ({"jobDeploymentStatus": "Suspending"}, "waiting"),
    ({"jobDeploymentStatus": "Suspended"}, "waiting"),
    ({"jobDeploymentStatus": "Retrying", "failed": 1, "reason": "AppFailed"}, "waiting"),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "succeeded": 1}, "done"),
    ({"jobDeploymentStatus": "OfTheYearAfterNext"}, "waiting"),
]


@pytest.mark.parametrize(("status", "phase"), GOOD_STATES)
def test_rayjob_state_that_is_no_failure_lets_the_driver_go_on(status: dict[str, Any], phase: str) -> None:
    assert raised(rayjob_states.verdict(rayjob(**status))) == (phase, None)


@pytest.mark.parametrize(
    ("reason", "message", "error"),
    [
        ("SubmissionFailed", "Job submission has failed. Reason: BackoffLimitExceeded", TransientError),
        ("DeadlineExceeded", "The RayJob has passed the activeDeadlineSeconds.", TransientError),
        ("PreRunningDeadlineExceeded", "", TransientError),
        ("JobDeploymentStatusTransitionGracePeriodExceeded", "", TransientError),
        ("JobStatusCheckTimeoutExceeded", "timed out", TransientError),
        ("ValidationFailed", "backoffLimit must be a positive integer", ConfigError),
        ("AppFailed", "Job entrypoint command failed with exit code 1", SlipwayError),
        ("AppFailed", "Ray head pod not found.", TransientError),
        ("AppFailed", "Submitter completed but Ray job not found in RayCluster.", TransientError),
        ("AppFailed", "Job supervisor actor died unexpectedly", TransientError),
        ("SomethingNew", "as told by a newer operator", SlipwayError),
        ("", "", SlipwayError),
    ],
)
def test_failed_rayjob_is_told_by_its_reason(reason: str, message: str, error: type[SlipwayError]) -> None:
    verdict = rayjob_states.verdict(rayjob(jobDeploymentStatus="Failed", jobStatus="FAILED", reason=reason, message=message))
    assert raised(verdict) == ("failed", error)
    assert message.rstrip(".") in verdict.text
    assert "RayJob train" in verdict.text


BAD_ENDS: list[tuple[dict[str, Any], type[SlipwayError]]] = [
    ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, TransientError),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, SlipwayError),  # KubeRay before 1.1
    ({"jobDeploymentStatus": "ValidationFailed", "message": "name is too long"}, ConfigError),
    ({"jobDeploymentStatus": "Waiting"}, ConfigError),
]


@pytest.mark.parametrize(("status", "error"), BAD_ENDS)
def test_rayjob_that_ended_otherwise_than_well_is_a_failure(status: dict[str, Any], error: type[SlipwayError]) -> None:
    assert raised(rayjob_states.verdict(rayjob(**status))) == ("failed", error)


def test_retried_rayjob_says_which_try_and_why_and_failed_one_how_many() -> None:
    retrying = rayjob(spec={"backoffLimit": 2}, jobDeploymentStatus="Retrying", failed=1, message="exit code 1")
    assert rayjob_states.verdict(retrying).text == "try 1 of 3 failed (exit code 1); KubeRay starts the next one"
    assert "in 3 tries" in rayjob_states.verdict(rayjob(jobDeploymentStatus="Failed", reason="AppFailed", failed=3)).text


def test_suspended_rayjob_names_the_queue_that_holds_it() -> None:
    queued = rayjob(labels={"kueue.x-k8s.io/queue-name": "team-a"}, jobDeploymentStatus="Suspended")
    assert "queue team-a" in rayjob_states.verdict(queued).text
    assert "spec.suspend" in rayjob_states.verdict(rayjob(jobDeploymentStatus="Suspended")).text


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("pods is forbidden: violates PodSecurity restricted:latest", ("failed", ConfigError)),
        ("pods is forbidden: exceeded quota: team, requested: cpu=8", ("troubled", TransientError)),
        ("admission webhook policy.example denied the request", ("failed", ConfigError)),
        ("serviceaccount slipway not found", ("failed", ConfigError)),
    ],
)
def test_refused_pods_of_a_ray_cluster_are_told_while_it_starts(message: str, outcome: tuple[str, type[SlipwayError]]) -> None:
    status = cluster("ReplicaFailure", "True", "FailedCreateHeadPod", message)
    job = rayjob_states.verdict(rayjob(jobDeploymentStatus="Initializing", rayClusterStatus=status))
    assert raised(job) == outcome
    assert message in job.text
    service = rayservice(pendingServiceStatus={"rayClusterName": "c", "rayClusterStatus": status})
    assert raised(rayservice_states.verdict(service)) == outcome


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ({}, "being made"),
        (cluster("HeadPodReady", "False", "ContainersNotReady", "ray-head"), "head of its Ray cluster is not ready: ContainersNotReady"),
        (cluster("HeadPodReady", "True", "HeadPodRunningAndReady", availableWorkerReplicas=1, desiredWorkerReplicas=4), "1 of 4 workers"),
        ({"state": "ready"}, "is ready"),
    ],
)
def test_starting_ray_cluster_tells_how_far_it_is(status: dict[str, Any], text: str) -> None:
    assert text in rayjob_states.verdict(rayjob(jobDeploymentStatus="Initializing", rayClusterStatus=status)).text


def rayservice(*conditions: dict[str, Any], spec: dict[str, Any] | None = None, generation: int = 1, **status: Any) -> dict[str, Any]:
    filled = {"observedGeneration": 1, "conditions": list(conditions), **status}
    return {"kind": "RayService", "metadata": {"name": "toy", "generation": generation}, "spec": spec or {}, "status": filled}


def told(kind: str, status: str, reason: str, message: str = "so it is") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


READY, NOT_READY = told("Ready", "True", "NonZeroServeEndpoints"), told("Ready", "False", "Initializing")
UPGRADING, NOT_UPGRADING = told("UpgradeInProgress", "True", "BothActivePendingClustersExist"), told("UpgradeInProgress", "False", "x")


def serves(name: str, status: str, deployment: str = "HEALTHY") -> dict[str, Any]:
    state = {"status": deployment, "message": "replica 1"}
    return {"rayClusterName": name, "applicationStatuses": {"slipway": {"status": status, "serveDeploymentStatuses": {"model": state}}}}


RAYSERVICE_STATES: list[tuple[dict[str, Any], tuple[str, type[SlipwayError] | None]]] = [
    (rayservice(NOT_READY, NOT_UPGRADING), ("waiting", None)),
    (rayservice(READY, NOT_UPGRADING, numServeEndpoints=2), ("done", None)),
    (rayservice(READY, NOT_UPGRADING, generation=2), ("waiting", None)),  # what serves is what was before
    (rayservice(READY, UPGRADING, activeServiceStatus=serves("a", "RUNNING")), ("running", None)),
    (rayservice(told("Ready", "False", "InitializingTimeout")), ("failed", TransientError)),
    (rayservice(told("Ready", "False", "ZeroServeEndpoints")), ("troubled", TransientError)),
    (rayservice(told("Ready", "False", "ValidationFailed")), ("failed", ConfigError)),
    (rayservice(READY, told("RollbackInProgress", "True", "x")), ("troubled", TransientError)),
    (rayservice(told("Suspended", "True", "x")), ("waiting", None)),
    (rayservice(READY, spec={"suspend": True}), ("waiting", None)),
    (rayservice(NOT_READY, pendingServiceStatus=serves("b", "DEPLOY_FAILED")), ("failed", SlipwayError)),
    (rayservice(NOT_READY, pendingServiceStatus=serves("b", "DEPLOYING", "UPDATING")), ("waiting", None)),
    (rayservice(NOT_READY, pendingServiceStatus=serves("b", "NOT_STARTED", "UPDATING")), ("waiting", None)),
    (rayservice(READY, activeServiceStatus=serves("a", "UNHEALTHY")), ("troubled", TransientError)),
    (rayservice(READY, activeServiceStatus=serves("a", "RUNNING", "UNHEALTHY")), ("troubled", TransientError)),
    (rayservice(serviceStatus="Running"), ("done", None)),
    *(
        (rayservice(serviceStatus=state), ("troubled", TransientError))
        for state in ("FailedToGetOrCreateRayCluster", "FailedToUpdateService", "FailedToUpdateServingPodLabel")
    ),
    (rayservice(serviceStatus="WaitForServeDeploymentReady"), ("waiting", None)),
    ({"kind": "RayService", "metadata": {"name": "toy"}}, ("waiting", None)),
]


@pytest.mark.parametrize(("service", "outcome"), RAYSERVICE_STATES)
def test_rayservice_state_is_told(service: dict[str, Any], outcome: tuple[str, type[SlipwayError] | None]) -> None:
    assert raised(workload_states.verdict(service)) == outcome


def test_failed_upgrade_says_that_what_was_served_goes_on() -> None:
    upgrade = rayservice(READY, UPGRADING, activeServiceStatus=serves("a", "RUNNING"), pendingServiceStatus=serves("b", "DEPLOY_FAILED"))
    assert "What was served before goes on" in rayservice_states.verdict(upgrade).text
    first = rayservice(NOT_READY, pendingServiceStatus=serves("b", "DEPLOY_FAILED"))
    assert "goes on" not in rayservice_states.verdict(first).text


@NEEDS_KUBERAY
def test_states_of_these_tests_are_ones_that_the_cluster_would_store() -> None:
    kinds = custom_kinds(ray_definitions())
    jobs = [rayjob(**status) for status, _ in [*GOOD_STATES, *BAD_ENDS]] + [
        rayjob(jobDeploymentStatus="Failed", reason="AppFailed", message="x", failed=3)
    ]
    services = [service for service, _ in RAYSERVICE_STATES]
    assert len(jobs) > 10
    assert len(services) > 10
    for found in [*jobs, *services]:
        document = {**found, "apiVersion": "ray.io/v1", "spec": {}, "status": timed(found.get("status") or {})}
        admitted = admit(document, kinds["ray.io/v1", found["kind"]])
        wrong = [line for line in [*admitted.unknown, *admitted.problems] if "status" in line]
        assert wrong == [], found


def timed(status: Any) -> Any:
    """A status with the times that its conditions must have."""
    if isinstance(status, list):
        return [timed(each) for each in status]
    if not isinstance(status, dict):
        return status
    moment = {"lastTransitionTime": "2026-01-01T00:00:00Z"} if {"type", "status", "reason"} <= set(status) else {}
    return {**{key: timed(value) for key, value in status.items()}, **moment}
