"""The rules over rendered manifests: a release in which all is right passes, and each fault is named with its object and path."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.expressions import expression_problems, metric_names
from tests.charts.judge import judge, known_kinds, needs_kuberay, schema_problems
from tests.charts.kinds import OUR_KINDS

VERSION = "1.34.0"
GONE = object()
POD = "spec.template.spec"
CRANE = f"{POD}.containers.0"
RAY = "spec.rayClusterConfig"


@functools.cache
def yard() -> str:
    """The good release, as JSON: what YAML's anchors share becomes two."""
    return json.dumps(yaml.safe_load(Path(__file__).with_name("yard.yaml").read_text()))


def broken(name: str, path: str, value: Any) -> list[dict[str, Any]]:
    """The release with one value changed, added or, with GONE, taken out; `%` in a path stands for a dot of a key."""
    documents: list[dict[str, Any]] = json.loads(yard())
    kind, _, own = name.partition("/")
    node: Any = next(it for it in documents if (it["kind"], it["metadata"]["name"]) == (kind, own))
    *keys, last = [int(key) if key.isdecimal() else key.replace("%", ".") for key in path.split(".")]
    for key in keys:
        node = node[key] if isinstance(node, list) else node.setdefault(key, {})
    if value is GONE:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return documents


def problems_of(documents: list[dict[str, Any]]) -> list[str]:
    """As the matrix judges, without KubeRay's kinds where their definitions are not here."""
    known = [it for it in documents if not needs_kuberay([it], known_kinds())]
    return judge(known, VERSION, later=[it for it in documents if it not in known]) + expression_problems(documents)


@pytest.mark.parametrize("version", ["1.30.0", "1.34.0", "1.37.0"])
def test_judge_release_without_a_fault_passes(version: str) -> None:
    known = [it for it in json.loads(yard()) if not needs_kuberay([it], known_kinds())]
    assert judge(known, version, later=json.loads(yard())) == []


SCHEMA_FAULTS = [
    ("Deployment/yard-crane", "spec.replicsa", 2, "Additional properties are not allowed ('replicsa'"),
    ("Deployment/yard-crane", f"{CRANE}.ports.0.containerPort", "http", "spec.template.spec.containers.0.ports.0.containerPort"),
    ("HTTPRoute/yard", "spec.rules.0.backendRef", [], "spec.rules[0].backendRef: unknown field"),
    ("PrometheusRule/yard", "spec.groups.0.rules.1.for", "ten minutes", "spec.groups[0].rules[1].for: 'ten minutes' does not match"),
    ("ServiceMonitor/yard", "apiVersion", "monitoring.coreos.com/v2", "no schema of monitoring.coreos.com/v2 ServiceMonitor"),
    ("HorizontalPodAutoscaler/yard-crane", "apiVersion", "autoscaling/v2beta2", "Kubernetes 1.34.0 has no such kind"),
]
POD_FAULTS = [
    ("image", "yard.example/crane:latest", "has no version"),
    ("image", "yard.example/crane", "has no version"),
    ("image", "", "'' is no reference of an image"),
    ("name", "Crane", "'Crane' is no name of a container"),
    ("env.0", {"name": "KEY", "value": "x"}, "env: 'KEY' is there twice"),
    ("env.0.name", "1 HOME", "'1 HOME' is no name of a variable"),
    ("env.1.value", "x", "env[KEY]: one source is needed, found ['value', 'valueFrom']"),
    ("ports.1", {"containerPort": 8080}, "ports: (8080, 'TCP') is there twice"),
    ("ports.1.name", "http", "ports: 'http' is there twice"),
    ("ports.1.name", "a-name-too-long-for-it", "is no name of a port"),
    ("ports.1.containerPort", 70_000, "70000 is no port"),
    ("readinessProbe.httpGet.port", "https", "readinessProbe.httpGet.port: 'https' is not one of"),
    ("readinessProbe.exec", {"command": ["true"]}, "one handler is needed, found ['exec', 'httpGet']"),
    ("livenessProbe.successThreshold", 2, "livenessProbe.successThreshold: 1 is needed"),
    ("readinessProbe.timeoutSeconds", 0, "readinessProbe.timeoutSeconds: 0 is below 1"),
    ("resources.requests.memory", "3Gi", "resources.requests.memory: 3Gi is more than the limit 2Gi"),
    ("resources.limits.memory", "2 GB", "resources.limits.memory: '2 GB' is no quantity"),
    ("resources.limits.nvidia%com/gpu", "0.5", "a device is a whole one"),
    ("resources.requests.nvidia%com/gpu", 1, "a device is asked for by an equal limit"),
    ("resources.limits", GONE, "a limit of memory and a request of CPU are needed"),
    ("volumeMounts.0.name", "absent", "the pod has no volume 'absent'"),
    ("volumeMounts.1.mountPath", "/data", "'/data' is there twice"),
    ("volumeMounts.1.mountPath", "tmp", "'tmp' is no path"),
    ("volumeMounts.1", GONE, "volumes[tmp]: no container mounts it"),
    ("lifecycle.preStop.sleep.seconds", 60, "sleeps 60 s, and the pod is killed after 60 s"),
    ("securityContext.readOnlyRootFilesystem", GONE, "securityContext.readOnlyRootFilesystem: true is needed"),
    ("securityContext.allowPrivilegeEscalation", True, "securityContext.allowPrivilegeEscalation: false is needed"),
    ("securityContext.privileged", True, "securityContext.privileged: a restricted pod does without"),
    ("securityContext.capabilities.add", ["NET_ADMIN"], "securityContext.capabilities: all must be dropped"),
]
SPEC_FAULTS = [
    ("hostNetwork", True, "hostNetwork: a restricted pod does without"),
    ("securityContext.seccompProfile", GONE, "securityContext.seccompProfile: RuntimeDefault is needed"),
    ("securityContext.runAsUser", 0, "a user that is not 0"),
    ("volumes.1", {"name": "tmp", "hostPath": {"path": "/"}}, "no volume of type hostPath"),
    ("volumes.1.configMap", {"name": "yard-config"}, "one source is needed, found ['configMap', 'emptyDir']"),
    ("volumes.1.emptyDir.sizeLimit", "1 GB", "'1 GB' is no quantity"),
    ("volumes.1.name", "config", "volumes: 'config' is there twice"),
    ("volumes.0.configMap.name", "absent", "there is no ConfigMap/absent"),
    ("volumes.2.persistentVolumeClaim.claimName", "absent", "there is no PersistentVolumeClaim/absent"),
    ("tolerations.0.key", "a b", "tolerations[0]: 'a b' is no key"),
    ("tolerations.0.value", "yes", "a value beside the operator Exists"),
    ("tolerations.0.tolerationSeconds", 5, "tolerationSeconds needs the effect NoExecute"),
    ("tolerations.0", {"effect": "NoSchedule"}, "no key, which only Exists may lack"),
    ("serviceAccountName", "absent", "serviceAccountName 'absent' is not one of ['yard']"),
    ("restartPolicy", "OnFailure", "'OnFailure' is not Always"),
]
OBJECT_FAULTS = [
    ("ConfigMap/yard-config", "metadata.name", "Yard", "'Yard' is no name of an object"),
    ("ConfigMap/yard-config", "metadata.labels", {"a b": "c"}, "metadata.labels: 'a b' is no key"),
    ("ConfigMap/yard-config", "metadata.labels", {"a": "b c"}, "metadata.labels.a: 'b c' is no label"),
    ("ConfigMap/yard-config", "metadata.annotations", {"a": "x" * 300_000}, "metadata.annotations: larger than 256 KiB"),
    ("ConfigMap/yard-config", "data", {"a/b": ""}, "data: 'a/b' is no name of a file"),
    ("ConfigMap/yard-config", "data.big", "x" * (1 << 20), "1 MiB at most"),
    ("ConfigMap/yard-config", "data.big", "x" * 1_600_000, "1500000 at most"),
    ("Deployment/yard-crane", "spec.selector", {}, "spec.selector: an empty one is refused"),
    ("Deployment/yard-crane", "spec.selector.matchLabels.other", "x", "spec.selector: does not match the labels of its own template"),
    ("Deployment/yard-crane", "spec.strategy.type", "Recreate", "spec.strategy.rollingUpdate: not beside Recreate"),
    ("Deployment/yard-crane", "spec.strategy.rollingUpdate.maxSurge", 0, "maxSurge and maxUnavailable are both 0"),
    ("Service/yard-crane", "metadata.name", "1yard", "'1yard' is no name of a Service"),
    ("Service/yard-crane", "spec.ports.1.name", GONE, "each needs a name where there are several"),
    ("Service/yard-crane", "spec.ports.1.port", 80, "(80, 'TCP') is there twice"),
    ("Service/yard-crane", "spec.ports.0.targetPort", "https", "targetPort 'https' is no port of Deployment/yard-crane"),
    ("Service/yard-crane", "spec.selector.app%kubernetes%io/component", "carne", "spec.selector selects no pod"),
    ("Service/yard-crane", "spec.selector", {"app.kubernetes.io/instance": "yard"}, "selects pods of several objects"),
    ("PodDisruptionBudget/yard-crane", "spec.minAvailable", 1, "minAvailable or maxUnavailable is needed, one of them"),
    ("PodDisruptionBudget/yard-crane", "spec.maxUnavailable", 0, "lets no node be drained"),
    ("PodDisruptionBudget/yard-crane", "spec.maxUnavailable", 2, "spec.maxUnavailable 2 of 2 pods protects nothing"),
    ("PodDisruptionBudget/yard-crane", "spec.selector.matchLabels.a", "b", "spec.selector selects no pod"),
    ("HorizontalPodAutoscaler/yard-crane", "spec.minReplicas", 6, "6 is not within 1 and maxReplicas 5"),
    ("HorizontalPodAutoscaler/yard-crane", "spec.scaleTargetRef.name", "absent", "there is no Deployment/absent"),
    ("HorizontalPodAutoscaler/yard-crane", "spec.metrics.0.resource.target.value", "1", "one resource with one target is needed"),
    ("Deployment/yard-crane", "spec.replicas", 3, "sets replicas itself"),
    ("NetworkPolicy/yard-crane", "spec.ingress.0.ports.0.port", "https", "spec.ingress: port https is no port"),
    ("NetworkPolicy/yard-crane", "spec.egress.0.ports.0.port", 8266, "spec.egress: port 8266 is no port of"),
    ("NetworkPolicy/yard-crane", "spec.egress.0.to.0.podSelector.matchLabels.a", "b", "spec.egress: no pod has the labels"),
    ("NetworkPolicy/yard-crane", "spec.egress.1.to.0.ipBlock.except.0", "11.0.0.0/8", "an exception is not within 10.0.0.0/8"),
    ("NetworkPolicy/yard-crane", "spec.egress.1.to.0.ipBlock.cidr", "10.0.0.1/8", "has host bits set"),
    ("NetworkPolicy/yard-crane", "spec.egress.1.to.0.podSelector", {}, "a peer is an ipBlock or selectors"),
    ("NetworkPolicy/yard-crane", "spec.policyTypes", ["Ingress"], "policyTypes lacks Egress"),
    ("NetworkPolicy/yard-crane", "spec.podSelector.matchLabels.a", "b", "spec.podSelector selects no pod"),
    ("Ingress/yard", "spec.rules.0.host", "yard_1.example", "'yard_1.example' is no name of a host"),
    ("Ingress/yard", "spec.rules.0.http.paths.0.path", "v1", "'v1' does not begin with /"),
    ("Ingress/yard", "spec.rules.0.http.paths.0.backend.service.port.number", 80, "has a name or a number, one of them"),
    ("Ingress/yard", "spec.rules.0.http.paths.0.backend.service.name", "absent", "backend absent:http: there is no such Service"),
    ("HTTPRoute/yard", "spec.rules.0.backendRefs.0.port", 81, "backend yard-crane:81"),
    ("ServiceMonitor/yard", "spec.endpoints.0.port", "metric", "port 'metric' is not one of ['http', 'metrics']"),
    ("PodMonitor/yard", "spec.selector.matchLabels.a", "b", "spec.selector selects nothing"),
    ("PrometheusRule/yard", "spec.groups.0.rules.0.expr", "sum(rate(x[5m])", "yard/yard:lifts:rate5m: unclosed left parenthesis"),
    ("PrometheusRule/yard", "spec.groups.0.rules.1.labels", GONE, "an alert needs a severity and a summary"),
    ("PrometheusRule/yard", "spec.groups.0.rules.0.alert", "Both", "a rule is an alert or a record"),
    ("ConfigMap/yard-dashboard", "data", {"y.json": '{"panels": [{"title": "t", "targets": [{"expr": "rate("}]}]}'}, "y.json/t:"),
    ("Job/yard-plan", f"{POD}.restartPolicy", GONE, "'Always' is not one of Never, OnFailure"),
    ("Job/yard-plan", f"{POD}.restartPolicy", "OnFailure", "podFailurePolicy: needs restartPolicy Never"),
    ("Job/yard-plan", "spec.podFailurePolicy.rules.0.onExitCodes.values", [3, 2], "ordered, each once and not 0"),
    ("Job/yard-plan", "spec.podFailurePolicy.rules.0.onExitCodes.values", [0], "ordered, each once and not 0"),
    ("Job/yard-plan", "spec.podFailurePolicy.rules.0.onExitCodes.containerName", "x", "no container 'x'"),
    ("CronJob/yard-plan", "spec.schedule", "17 3 * *", "'17 3 * *' is no cron time"),
    ("CronJob/yard-plan", "spec.timeZone", "Europe/Atlantis", "'Europe/Atlantis' is no time zone"),
    ("CronJob/yard-plan", "metadata.name", "a" * 53, "longer than 52 characters"),
    ("CronJob/yard-plan", "spec.jobTemplate.spec.template.spec.restartPolicy", "Always", "'Always' is not one of Never, OnFailure"),
    ("PersistentVolumeClaim/yard", "spec.resources.requests.storage", "10GB", "accessModes and a size are needed"),
    ("Role/yard", "rules.0.verbs", ["*"], "a wildcard is more than least privilege"),
    ("RoleBinding/yard", "roleRef.name", "absent", "roleRef: there is no Role/absent"),
    ("RoleBinding/yard", "subjects.0.namespace", GONE, "a ServiceAccount needs its namespace"),
    ("ServiceAccount/yard", "metadata.name", "other", "serviceAccountName 'yard' is not one of ['other']"),
    ("Role/yard", "metadata.name", "other", "roleRef: there is no Role/yard"),
]
HEAD = f"{RAY}.headGroupSpec"
GROUP = f"{RAY}.workerGroupSpecs.0"
KUBERAY_FAULTS = [
    ("RayService/yard-model", "metadata.name", "a" * 48, "is not at most 47 of a-z"),
    ("RayService/yard-model", "metadata.name", "1-model", "beginning with a letter"),
    ("RayService/yard-model", f"{GROUP}.minReplicas", 9, "9 is above maxReplicas 8"),
    ("RayService/yard-model", f"{GROUP}.replicas", 9, "9 is not within minReplicas 1 and maxReplicas 8"),
    ("RayService/yard-model", f"{GROUP}.rayStartParams", {"num-cpus": 4}, "string is needed, found int 4"),
    ("RayService/yard-model", f"{HEAD}.resources", {"CPU": "4"}, "beside rayStartParams ['num-cpus']"),
    ("RayService/yard-model", f"{GROUP}.template.spec.restartPolicy", "Always", "the autoscaler needs Never, or none"),
    ("RayService/yard-model", f"{GROUP}.suspend", True, "not beside enableInTreeAutoscaling"),
    ("RayService/yard-model", f"{HEAD}.template.metadata.labels.app%kubernetes%io/name", "yard", "Ray's head is found by 'kuberay'"),
    ("RayService/yard-model", f"{HEAD}.template.spec.containers.0.env", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}], "RAY_REDIS_ADDRESS"),
    ("RayService/yard-model", f"{HEAD}.template.spec.containers.0.image", "ray:latest", "has no version"),
    ("RayService/yard-model", f"{RAY}.enableInTreeAutoscaling", False, "incremental upgrades need"),
    ("RayService/yard-model", "spec.upgradeStrategy.type", "Rolling", "'Rolling' is not one of NewCluster"),
    ("RayService/yard-model", "spec.upgradeStrategy.clusterUpgradeOptions.intervalSeconds", 0, "above 0 is needed, found 0"),
    ("RayService/yard-model", "spec.upgradeStrategy.clusterUpgradeOptions.stepSizePercent", 101, "0 to 100 is needed, found 101"),
    ("RayService/yard-model", "spec.serveConfigV2", "applications: []", "serveConfigV2: no applications in it"),
    ("RayService/yard-model", "spec.serveConfigV2", "applications: [{name: a}, {name: a}]", "two applications have the same name"),
    ("RayJob/yard-train", "spec.entrypoint", GONE, "entrypoint: needed in K8sJobMode"),
    ("RayJob/yard-train", "spec.submissionMode", "Carrier", "'Carrier' is not one of HTTPMode"),
    ("RayJob/yard-train", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"),
    ("RayJob/yard-train", "spec.activeDeadlineSeconds", 0, "activeDeadlineSeconds: 0 is below 1"),
    ("RayJob/yard-train", "spec.clusterSelector", {"ray.io/cluster": "x"}, "this or clusterSelector is needed, one of them"),
    ("RayJob/yard-train", "spec.runtimeEnvYAML", "[a]", "runtimeEnvYAML: a mapping is needed"),
    ("RayJob/yard-train", "spec.maxRetries", 3, "spec.maxRetries: unknown field"),
]


@pytest.mark.parametrize(("name", "path", "value", "said"), SCHEMA_FAULTS + OBJECT_FAULTS, ids=lambda it: str(it)[:40])
def test_judge_fault_of_an_object_is_named(name: str, path: str, value: Any, said: str) -> None:
    assert any(said in line for line in problems_of(broken(name, path, value))), problems_of(broken(name, path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [(f"{CRANE}.{path}", value, said) for path, value, said in POD_FAULTS]
    + [(f"{POD}.{path}", value, said) for path, value, said in SPEC_FAULTS],
    ids=lambda it: str(it)[:40],
)
def test_judge_fault_of_a_pod_is_named(path: str, value: Any, said: str) -> None:
    found = problems_of(broken("Deployment/yard-crane", path, value))
    assert any(line.startswith("Deployment/") and said in line for line in found), found


@pytest.mark.parametrize(("name", "path", "value", "said"), KUBERAY_FAULTS, ids=lambda it: str(it)[:40])
def test_judge_fault_that_the_operator_would_refuse_is_named(kuberay: None, name: str, path: str, value: Any, said: str) -> None:
    found = problems_of(broken(name, path, value))
    assert any(line.startswith("Ray") and said in line for line in found), found


def test_judge_two_objects_of_one_name_are_named() -> None:
    documents = json.loads(yard())
    assert "Role/yard: there twice" in problems_of([*documents, next(it for it in documents if it["kind"] == "Role")])


def test_judge_names_that_are_given_need_not_be_rendered() -> None:
    documents = broken("Deployment/yard-crane", f"{POD}.volumes.0.configMap.name", "theirs")
    assert [line for line in problems_of(documents) if "theirs" in line]
    known = [it for it in documents if not needs_kuberay([it], known_kinds())]
    assert not [line for line in judge(known, VERSION, given={"theirs"}, later=documents) if "theirs" in line]


def test_our_kinds_refuse_no_field_that_their_own_defaults_set() -> None:
    kinds = known_kinds()
    found = {definition["spec"]["names"]["kind"] for definition in OUR_KINDS}
    assert found == {"ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute"}
    documents = [it for it in json.loads(yard()) if it["kind"] in found]
    assert len(documents) == 4
    for document in documents:
        assert schema_problems(document, VERSION, kinds) == []
        assert schema_problems({**document, "spec": None}, VERSION, kinds)


def test_metric_names_of_an_expression_are_all_it_reads() -> None:
    assert metric_names('sum by (a) (rate(x_total{m="y"}[5m])) / on () group_left a:b:c > 3') == {"x_total", "a:b:c"}
