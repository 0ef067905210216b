"""What the objects of one rendered chart say of each other: selectors, ports, bounds and references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.charts.pods import RAY_HEAD_PORTS, Document, PodTemplate, find, matches, pod_templates, told

SCALED = ("Deployment", "StatefulSet")
# Made by the cluster or its operators, never by a chart.
FOREIGN_CONFIG_MAPS = {"kube-root-ca.crt"}


@dataclass(frozen=True)
class Release:
    """All objects of one rendered chart, and the pods that they lead to."""

    documents: Sequence[Document]
    pods: Sequence[PodTemplate]
    given: Collection[str] = ()
    """Names of objects that are in the cluster already, as the values say."""

    def named(self, kind: str, name: str) -> Document | None:
        """The object of that kind and name."""
        return next((it for it in self.documents if (it["kind"], it["metadata"]["name"]) == (kind, name)), None)

    def of(self, *kinds: str) -> list[Document]:
        """All objects of these kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    def selected(self, selector: Mapping[str, Any] | None) -> list[PodTemplate]:
        """The pods that a selector selects."""
        return [pod for pod in self.pods if matches(selector, pod.labels)]


def release_problems(documents: Sequence[Document], given: Collection[str] = (), later: Sequence[Document] = ()) -> list[str]:
    """Everything in which the objects do not fit each other, a line each with the object.

    `given` are names of objects that are in the cluster already; `later` are objects that programs of the release will make, whose pods
    its policies and monitors are for.
    """
    pods = [pod for document in [*documents, *later] for pod in pod_templates(document)]
    release = Release(documents, pods, {*given, *FOREIGN_CONFIG_MAPS})
    found = [f"{told_twice}: there twice" for told_twice, count in Counter(map(told, documents)).items() if count > 1]
    return found + [f"{told(document)}: {line}" for document in documents for check in CHECKS for line in check(document, release)]


def _service(document: Document, release: Release) -> Iterator[str]:
    selector = document["spec"].get("selector") if document["kind"] == "Service" else None
    if not selector:
        return
    pods = release.selected({"matchLabels": selector})
    if not pods:
        yield f"spec.selector selects no pod: {dict(selector)}"
    if len({pod.owner for pod in pods}) > 1:
        yield f"spec.selector selects pods of several objects: {sorted({pod.owner for pod in pods})}"
    for port in document["spec"].get("ports", ()):
        yield from (_unknown_port("targetPort", port.get("targetPort", port["port"]), pod) for pod in pods if not _has(pod, port))


def _budget(document: Document, release: Release) -> Iterator[str]:
    if document["kind"] != "PodDisruptionBudget":
        return
    pods = release.selected(document["spec"].get("selector"))
    if not pods:
        yield f"spec.selector selects no pod: {document['spec'].get('selector')}"
        return
    least = sum(_least(pod, release) for pod in pods)
    available, unavailable = document["spec"].get("minAvailable"), document["spec"].get("maxUnavailable")
    if isinstance(available, int) and available >= least:
        yield f"spec.minAvailable {available} of {least} pods lets no node be drained"
    if str(unavailable) in ("0", "0%"):
        yield f"spec.maxUnavailable {unavailable} lets no node be drained"
    if isinstance(unavailable, int) and unavailable >= max(least, 2):
        yield f"spec.maxUnavailable {unavailable} of {least} pods protects nothing"


def _least(pod: PodTemplate, release: Release) -> int:
    """The fewest pods, as a HorizontalPodAutoscaler has it where there is one."""
    for scaler in release.of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" == pod.owner:
            return int(scaler["spec"].get("minReplicas", 1))
    return pod.least


def _scaler(document: Document, release: Release) -> Iterator[str]:
    if document["kind"] != "HorizontalPodAutoscaler":
        return
    target = document["spec"]["scaleTargetRef"]
    scaled = release.named(target["kind"], target["name"])
    if scaled is None or target["kind"] not in SCALED:
        yield f"spec.scaleTargetRef: there is no {target['kind']}/{target['name']}"
    elif "replicas" in scaled["spec"]:
        yield f"spec.scaleTargetRef: {target['kind']}/{target['name']} sets replicas itself, so every upgrade undoes the scaling"


def _network_policy(document: Document, release: Release) -> Iterator[str]:
    if document["kind"] != "NetworkPolicy":
        return
    spec = document["spec"]
    pods = release.selected(spec.get("podSelector"))
    if not pods:
        yield f"spec.podSelector selects no pod: {spec.get('podSelector')}"
    for rule in spec.get("ingress") or ():
        for port in rule.get("ports", ()):
            if pods and "endPort" not in port and not any(_listens(pod, port.get("port")) for pod in pods):
                yield f"spec.ingress: port {port.get('port')} is no port of {sorted({pod.owner for pod in pods})}"
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or ():
            yield from (f"spec.{direction}: {line}" for peer in rule.get(peers, ()) for line in _peer(peer, rule, direction, release))


def _peer(peer: Mapping[str, Any], rule: Mapping[str, Any], direction: str, release: Release) -> Iterator[str]:
    """A peer that is one of our own pods is there, and listens on the ports that it is reached by."""
    labels = (peer.get("podSelector") or {}).get("matchLabels", {})
    if "namespaceSelector" in peer or labels.get("app.kubernetes.io/part-of") != "slipway":
        return
    pods = release.selected(peer["podSelector"])
    if not pods and "app.kubernetes.io/instance" in labels:
        yield f"no pod has the labels {labels}"
    if direction == "egress" and pods:
        for port in rule.get("ports", ()):
            if "endPort" not in port and not any(_listens(pod, port.get("port")) for pod in pods):
                yield f"port {port.get('port')} is no port of {sorted({pod.owner for pod in pods})}"


def _monitor(document: Document, release: Release) -> Iterator[str]:
    kinds = {"ServiceMonitor": "endpoints", "PodMonitor": "podMetricsEndpoints"}
    if document["kind"] not in kinds:
        return
    spec = document["spec"]
    if document["kind"] == "ServiceMonitor":
        services = [it for it in release.of("Service") if matches(spec["selector"], it["metadata"].get("labels", {}))]
        names = {port.get("name") for it in services for port in it["spec"]["ports"]}
        found: Sequence[Any] = services
    else:
        found = release.selected(spec["selector"])
        names = {name for pod in found for name in pod.ports.values()}
    if not found:
        yield f"spec.selector selects nothing: {spec['selector']}"
    for endpoint in spec[kinds[document["kind"]]]:
        if endpoint.get("port") not in names:
            yield f"spec.{kinds[document['kind']]}: port {endpoint.get('port')!r} is not one of {sorted(filter(None, names))}"


def _routes(document: Document, release: Release) -> Iterator[str]:
    backends: list[tuple[str, Any]] = []
    if document["kind"] == "HTTPRoute":
        refs = [ref for rule in document["spec"].get("rules", ()) for ref in rule.get("backendRefs", ())]
        backends = [(ref["name"], ref.get("port")) for ref in refs if ref.get("kind", "Service") == "Service"]
    if document["kind"] == "Ingress":
        paths = [path for rule in document["spec"].get("rules", ()) for path in rule["http"]["paths"]]
        services = [path["backend"]["service"] for path in paths]
        backends = [(service["name"], service["port"].get("number", service["port"].get("name"))) for service in services]
    for name, port in backends:
        service = release.named("Service", name)
        ports = {value for each in (service or {"spec": {}})["spec"].get("ports", ()) for value in (each["port"], each.get("name"))}
        if port not in ports:
            yield f"backend {name}:{port}: there is no such Service, or it has no such port"


def _roles(document: Document, release: Release) -> Iterator[str]:
    if document["kind"] not in ("RoleBinding", "ClusterRoleBinding"):
        return
    role = document["roleRef"]
    if release.named(role["kind"], role["name"]) is None:
        yield f"roleRef: there is no {role['kind']}/{role['name']}"
    for subject in document.get("subjects", ()):
        if subject["kind"] == "ServiceAccount" and not subject.get("namespace"):
            yield "subjects: a ServiceAccount needs its namespace"


def _pod_references(document: Document, release: Release) -> Iterator[str]:
    for pod in pod_templates(document):
        account = pod.spec.get("serviceAccountName", "default")
        made = [it["metadata"]["name"] for it in release.of("ServiceAccount")]
        if made and account not in [*made, "default"]:
            yield f"{pod.path}: serviceAccountName {account!r} is not one of {made}"
        claims = [find(volume, ("persistentVolumeClaim", "claimName")) for volume in pod.spec.get("volumes", ())]
        for name in filter(None, claims):
            if release.named("PersistentVolumeClaim", name) is None and name not in release.given:
                yield f"{pod.path}: there is no PersistentVolumeClaim/{name}"
        for name in _config_maps(pod):
            if release.named("ConfigMap", name) is None and name not in release.given:
                yield f"{pod.path}: there is no ConfigMap/{name}"


def _config_maps(pod: PodTemplate) -> Iterator[str]:
    """Names of the ConfigMaps without which the pod does not start."""
    for volume in pod.spec.get("volumes", ()):
        sources = [volume, *(volume.get("projected") or {}).get("sources", ())]
        yield from (it["configMap"]["name"] for it in sources if "configMap" in it and not it["configMap"].get("optional"))
    for container in pod.containers:
        refs = [each.get("configMapRef") for each in container.get("envFrom", ())]
        refs += [find(each, ("valueFrom", "configMapKeyRef")) for each in container.get("env", ())]
        yield from (ref["name"] for ref in refs if ref and not ref.get("optional"))


def _unknown_port(field: str, port: Any, pod: PodTemplate) -> str:
    return f"spec.ports: {field} {port!r} is no port of {pod.owner} {pod.path}: {pod.ports}"


def _has(pod: PodTemplate, port: Mapping[str, Any]) -> bool:
    return _listens(pod, port.get("targetPort", port["port"]))


def _listens(pod: PodTemplate, port: Any) -> bool:
    if port is None or port in pod.ports or port in pod.ports.values():
        return True
    return pod.labels.get("ray.io/node-type") == "head" and port in RAY_HEAD_PORTS


CHECKS: tuple[Callable[[Document, Release], Iterator[str]], ...] = (
    _service, _budget, _scaler, _network_policy, _monitor, _routes, _roles, _pod_references
)  # fmt: skip
