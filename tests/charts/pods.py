"""The pods that rendered objects lead to, whoever makes them: Kubernetes' own controllers or KubeRay's operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
TEMPLATES = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
CLUSTERS = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
# The operator's own, where autoscalerOptions names none.
AUTOSCALER_RESOURCES = {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "500m", "memory": "512Mi"}}
# What the operator's and Ray's own containers listen on beside what a template declares.
RAY_HEAD_PORTS = (6379, 8265, 10001, 8000)


@dataclass(frozen=True)
class PodTemplate:
    """A pod template of a rendered object."""

    owner: str
    """`Kind/name` of the object."""
    path: str
    """Where in the object."""
    kind: str
    """Kind of the object."""
    labels: Mapping[str, str]
    """Those of the template, and those that the operator adds."""
    spec: Mapping[str, Any]
    least: int
    """The fewest pods that it stands for, as far as the object itself says."""
    most: int

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All of them, the initial ones first."""
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    @property
    def ports(self) -> dict[int, str]:
        """Declared ports with their names, empty where one has none."""
        declared = [port for container in self.containers for port in container.get("ports", ())]
        return {port["containerPort"]: port.get("name", "") for port in declared}


def told(document: Document) -> str:
    """`Kind/name` of an object."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def find(document: Document, path: Sequence[str]) -> Any:
    """What lies at a path of keys, or None."""
    value: Any = document
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector, with its expressions, selects these labels; an empty one selects all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_meets(term, labels) for term in selector.get("matchExpressions", ()))


def pod_templates(document: Document) -> list[PodTemplate]:
    """Every pod template of one object."""
    kind = str(document.get("kind"))
    found = list(_ray_pods(document)) if kind in CLUSTERS else []
    if kind == "RayJob" and (template := find(document, ("spec", "submitterPodTemplate"))):
        found.append(_pod(document, "spec.submitterPodTemplate", template, 1, 1))
    if kind in TEMPLATES:
        template = find(document, TEMPLATES[kind]) or {}
        count = document["spec"].get("replicas", 1)
        found.append(_pod(document, ".".join(TEMPLATES[kind]), template, count, count))
    return found


def _ray_pods(document: Document) -> Iterator[PodTemplate]:
    path = CLUSTERS[str(document["kind"])]
    cluster = find(document, path) or {}
    where = ".".join(path)
    head = cluster.get("headGroupSpec", {})
    template = _with_autoscaler(head.get("template", {}), cluster)
    yield _pod(document, f"{where}.headGroupSpec.template", template, 1, 1, {"ray.io/node-type": "head"})
    for index, group in enumerate(cluster.get("workerGroupSpecs", ())):
        hosts = group.get("numOfHosts", 1)
        least, most = group.get("minReplicas", group.get("replicas", 0)), group.get("maxReplicas", group.get("replicas", 0))
        added = {"ray.io/node-type": "worker", "ray.io/group": group.get("groupName", "")}
        at = f"{where}.workerGroupSpecs[{index}].template"
        yield _pod(document, at, group.get("template", {}), least * hosts, most * hosts, added)


def _with_autoscaler(template: Document, cluster: Document) -> Document:
    """A head's template with the container that the operator adds to it where Ray's autoscaler is wanted."""
    spec = template.get("spec", {})
    if not cluster.get("enableInTreeAutoscaling") or not spec.get("containers"):
        return template
    options = cluster.get("autoscalerOptions", {})
    taken = ("env", "envFrom", "imagePullPolicy", "resources", "securityContext", "volumeMounts")
    container = {"name": "autoscaler", "image": spec["containers"][0].get("image"), "resources": AUTOSCALER_RESOURCES}
    container |= {key: options[key] for key in taken if key in options}
    return {**template, "spec": {**spec, "containers": [*spec["containers"], container]}}


def _pod(document: Document, path: str, template: Document, least: int, most: int, added: Mapping[str, str] | None = None) -> PodTemplate:
    labels = dict(template.get("metadata", {}).get("labels", {}))
    if added:
        # The operator sets its own labels only where the template has none of the same name.
        labels = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator", **labels, **added}
        labels["ray.io/is-ray-node"] = "yes"
    return PodTemplate(told(document), path, str(document["kind"]), labels, template.get("spec", {}), least, most)


def _meets(term: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(term["key"]), term.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[term["operator"]]
