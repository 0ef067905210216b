"""What a RayService's status means, from KubeRay's conditions and the states of its Ray Serve applications.

Source: KubeRay 1.7, ray-operator/apis/ray/v1/rayservice_types.go (conditions Ready, UpgradeInProgress and their reasons, the older
`serviceStatus`), and Ray Serve's ApplicationStatus and DeploymentStatus (ray 2.60, serve/schema.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import raycluster_states
from pipelines.cluster.states import Manifest, Verdict, condition, failed, holds, is_current, status_of, troubled

OLD_FAILURES = {  # `serviceStatus` of KubeRay before 1.3, which has no conditions
    "FailedToGetOrCreateRayCluster": "its Ray cluster could not be made",
    "FailedToGetServeDeploymentStatus": "Ray Serve's state could not be read",
    "FailedToUpdateServingPodLabel": "its pods could not be labelled",
    "FailedToUpdateService": "its Service could not be updated",
}
GOES_ON = "What was served before goes on; `slipway rollback` undoes the change."


def verdict(service: Manifest) -> Verdict:
    """What a RayService as read from the cluster means. `done` is: all of the newest spec serves."""
    status = status_of(service)
    name = f"RayService {service['metadata']['name']}"
    if not status:
        return Verdict("waiting", "KubeRay has not looked at it yet")
    for found in (_refused(service, name), _applications(status, name), _service(service, status, name)):
        if found is not None:
            return found
    return Verdict("waiting", raycluster_states.progress(_newest(status).get("rayClusterStatus") or {}))


def _refused(service: Manifest, name: str) -> Verdict | None:
    for each in status_of(service).get("conditions") or ():
        if each.get("reason") == "ValidationFailed":
            message = str(each.get("message") or "").rstrip(".")
            return failed(ConfigError(f"{name}: KubeRay refuses it ({message}). Correct the values that the message names."))
    cluster = _newest(status_of(service)).get("rayClusterStatus") or {}
    refused = raycluster_states.refusal(cluster, name)
    if refused is None:
        return None
    return troubled(refused) if raycluster_states.is_quota(cluster) else failed(refused)


def _applications(status: Manifest, name: str) -> Verdict | None:
    """The first application, or deployment of one, that failed or is ill; the cluster that is to come first."""
    serves_already = bool((status.get("activeServiceStatus") or {}).get("rayClusterName")) and _newest(status) != _active(status)
    for key in ("pendingServiceStatus", "activeServiceStatus"):
        for app, state, message in _states(status.get(key) or {}):
            cause = f" ({message.strip().rstrip('.')})" if message else ""
            if state == "DEPLOY_FAILED":
                advice = GOES_ON if serves_already else "The logs of its pods say more: slipway logs."
                return failed(SlipwayError(f"{name}: {app} could not be deployed{cause}. {advice}"))
            if state == "UNHEALTHY":
                return troubled(
                    TransientError(f"{name}: {app} is not healthy{cause}. Ray Serve starts replicas again; look at slipway logs.")
                )
    return None


def _states(cluster: Manifest) -> Iterator[tuple[str, str, str]]:
    for app, found in (cluster.get("applicationStatuses") or {}).items():
        yield f"application {app}", str(found.get("status") or ""), str(found.get("message") or "")
        for deployment, state in (found.get("serveDeploymentStatuses") or {}).items():
            yield f"deployment {deployment} of application {app}", str(state.get("status") or ""), str(state.get("message") or "")


def _service(service: Manifest, status: Manifest, name: str) -> Verdict | None:
    ready = condition(service, "Ready")
    if (service.get("spec") or {}).get("suspend") or holds(service, "Suspended") or holds(service, "Suspending"):
        return Verdict("waiting", "it is suspended; set spec.suspend to false to serve again")
    if holds(service, "RollbackInProgress"):
        return troubled(
            TransientError(f"{name}: KubeRay goes back to the cluster before ({condition(service, 'RollbackInProgress').get('message')}).")
        )
    if holds(service, "UpgradeInProgress"):
        share = _newest(status).get("trafficRoutedPercent")
        routed = "" if share is None else f", {share}% of the traffic goes there"
        return Verdict(
            "running", f"a new Ray cluster takes over: {raycluster_states.progress(_newest(status).get('rayClusterStatus') or {})}{routed}"
        )
    if ready.get("status") == "True" or (not ready and status.get("serviceStatus") == "Running"):
        return (
            Verdict("done", _endpoints(status)) if is_current(service) else Verdict("waiting", "KubeRay has not looked at the change yet")
        )
    if ready.get("reason") == "InitializingTimeout":
        text = f"{name} was not ready in the time that it had ({ready.get('message')})."
        return failed(TransientError(f"{text} Look at its pods, or raise the annotation ray.io/initializing-timeout."))
    if ready.get("reason") == "ZeroServeEndpoints":
        return troubled(TransientError(f"{name} has no endpoint that serves any more ({ready.get('message')}). Look at slipway logs."))
    if what := OLD_FAILURES.get(str(status.get("serviceStatus") or "")):
        return troubled(TransientError(f"{name}: {what}. KubeRay tries again; look at its operator's log."))
    return None


def _endpoints(status: Manifest) -> str:
    num = status.get("numServeEndpoints")
    return "it serves" if num is None else f"it serves from {num} endpoints"


def _active(status: Manifest) -> Manifest:
    return status.get("activeServiceStatus") or {}


def _newest(status: Manifest) -> Manifest:
    """The cluster that is to serve: the pending one where there is one."""
    pending = status.get("pendingServiceStatus") or {}
    return pending if pending.get("rayClusterName") else _active(status)
