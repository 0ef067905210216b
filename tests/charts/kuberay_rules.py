"""What KubeRay's operator refuses, or takes and never gets going, although its definitions allow it.

Source: the checks of https://github.com/ray-project/kuberay, ray-operator/controllers/ray/utils/validation.go, of v1.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.charts.pods import CLUSTERS, Document, find

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME_CHARS = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
UPGRADES = {"NewCluster", "None", "NewClusterWithIncrementalUpgrade"}
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def kuberay_problems(document: Document) -> list[str]:
    """Everything that the operator would object to in an object of its kinds, a line each with its path."""
    kind = str(document.get("kind"))
    if kind not in CLUSTERS:
        return []
    name = str(document["metadata"]["name"])
    found = []
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS[kind]:
        found.append(f"metadata.name: {name!r} is not at most {MAX_NAME_CHARS[kind]} of a-z, 0-9 and -, beginning with a letter")
    spec = document["spec"]
    if kind == "RayJob":
        found += [f"spec.{line}" for line in _job(spec)]
    if kind == "RayService":
        found += [f"spec.{line}" for line in _service(spec)]
    cluster = find(document, CLUSTERS[kind])
    if cluster:
        found += [f"{'.'.join(CLUSTERS[kind])}.{line}" for line in _cluster(cluster)]
    return found


def _job(spec: Document) -> Iterator[str]:
    selected = bool(spec.get("clusterSelector"))
    if bool(spec.get("rayClusterSpec")) == selected:
        yield "rayClusterSpec: this or clusterSelector is needed, one of them"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode: {mode!r} is not one of {', '.join(sorted(SUBMISSION_MODES))}"
    if mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield f"entrypoint: needed in {mode}"
    if mode in ("SidecarMode", "HTTPMode") and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield f"submitterPodTemplate: there is no pod that submits in {mode}"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "backoffLimit: InteractiveMode tries once"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML") or "{}"), dict):
        yield "runtimeEnvYAML: a mapping is needed"
    yield from _ending(spec, selected)


def _ending(spec: Document, selected: bool) -> Iterator[str]:
    ends = spec.get("shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished", 0) and not ends:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and (selected or not ends):
        yield "suspend: needs shutdownAfterJobFinishes and a cluster of its own"
    for key, least in (("ttlSecondsAfterFinished", 0), ("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        if spec.get(key, least) < least:
            yield f"{key}: {spec[key]} is below {least}"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and ends:
        yield "deletionStrategy.deletionRules: not beside shutdownAfterJobFinishes"


def _service(spec: Document) -> Iterator[str]:
    applications = (yaml.safe_load(spec.get("serveConfigV2") or "{}") or {}).get("applications", [])
    if not applications:
        yield "serveConfigV2: no applications in it"
    for key in ("name", "route_prefix"):
        values = [application[key] for application in applications if application.get(key) is not None]  # without a route, none is shared
        if len(values) != len(set(values)):
            yield f"serveConfigV2: two applications have the same {key}"
    strategy = spec.get("upgradeStrategy") or {}
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type: {kind!r} is not one of {', '.join(sorted(UPGRADES))}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds: below 0"
    if find(spec, ("rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")):
        yield "rayClusterConfig.headGroupSpec.headService.metadata.name: the operator names it"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(strategy.get("clusterUpgradeOptions") or {}, spec)


def _incremental(options: Document, spec: Document) -> Iterator[str]:
    at = "upgradeStrategy.clusterUpgradeOptions"
    if not spec.get("rayClusterConfig", {}).get("enableInTreeAutoscaling"):
        yield "upgradeStrategy: incremental upgrades need rayClusterConfig.enableInTreeAutoscaling"
    for key in ("maxSurgePercent", "stepSizePercent"):
        if not 0 <= options.get(key, -1 if key == "stepSizePercent" else 100) <= 100:
            yield f"{at}.{key}: 0 to 100 is needed, found {options.get(key)}"
    if options.get("intervalSeconds", 0) <= 0:
        yield f"{at}.intervalSeconds: above 0 is needed, found {options.get('intervalSeconds')}"
    if not options.get("gatewayClassName"):
        yield f"{at}.gatewayClassName: needed"


def _cluster(cluster: dict[str, Any]) -> Iterator[str]:
    head, groups = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs", [])
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    yield from _group("headGroupSpec", head, scales)
    names = [group.get("groupName") for group in groups]
    if len(names) != len(set(names)):
        yield f"workerGroupSpecs: two groups have the same name: {names}"
    for index, group in enumerate(groups):
        at = f"workerGroupSpecs[{index}]"
        yield from _group(at, group, scales)
        least, wanted, most = group.get("minReplicas", 0), group.get("replicas"), group.get("maxReplicas", 2**31 - 1)
        if least > most:
            yield f"{at}.minReplicas: {least} is above maxReplicas {most}"
        if wanted is not None and not least <= wanted <= most:
            yield f"{at}.replicas: {wanted} is not within minReplicas {least} and maxReplicas {most}"
        if group.get("suspend") and scales:
            yield f"{at}.suspend: not beside enableInTreeAutoscaling"
    name = find(head, ("template", "metadata", "labels", "app.kubernetes.io/name"))
    if name not in (None, "kuberay"):
        # The operator's Service of the head selects by its own name of the application, and would find no pod.
        yield f"headGroupSpec.template.metadata.labels: app.kubernetes.io/name is {name!r}, and Ray's head is found by 'kuberay'"
    yield from _head_variables(cluster, _variables(head), scales)
    if (cluster.get("authOptions") or {}).get("mode") == "token" and not cluster.get("rayVersion"):
        yield "authOptions: a token needs rayVersion"


def _head_variables(cluster: dict[str, Any], variables: dict[str, Any], scales: bool) -> Iterator[str]:
    if not scales and variables.get("RAY_enable_autoscaler_v2") in ("1", "true"):
        yield "headGroupSpec: RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling"
    if "REDIS_PASSWORD" in variables and cluster.get("gcsFaultToleranceOptions"):
        yield "headGroupSpec: REDIS_PASSWORD belongs into gcsFaultToleranceOptions"
    if "RAY_REDIS_ADDRESS" in variables:
        yield "headGroupSpec: RAY_REDIS_ADDRESS belongs into gcsFaultToleranceOptions"


def _group(at: str, group: dict[str, Any], scales: bool) -> Iterator[str]:
    spec = group.get("template", {}).get("spec", {})
    if not spec.get("containers"):
        yield f"{at}.template.spec.containers: at least one is needed"
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and RESOURCE_PARAMETERS & set(parameters):
        yield f"{at}.resources: beside rayStartParams {sorted(RESOURCE_PARAMETERS & set(parameters))}"
    if "labels" in parameters:
        yield f"{at}.rayStartParams.labels: labels have a field of their own"
    if not all(isinstance(value, str) for value in parameters.values()):
        yield f"{at}.rayStartParams: every value is a string"
    if scales and spec.get("restartPolicy", "Never") != "Never":
        yield f"{at}.template.spec.restartPolicy: the autoscaler needs Never, or none"


def _variables(group: dict[str, Any]) -> dict[str, Any]:
    containers = find(group, ("template", "spec", "containers")) or [{}]
    return {variable["name"]: variable.get("value") for variable in containers[0].get("env", ())}
