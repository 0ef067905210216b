"""What an API server refuses in an object of a built-in kind although the schema allows it."""

from __future__ import annotations

import ipaddress
import re
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.charts.pod_rules import KEY, PORT_NAME, QUANTITY, twins
from tests.charts.pods import TEMPLATES, Document, find, matches

SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
HOST = re.compile(r"(\*\.)?(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
FILE_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
CRON_FIELD = r"(\*|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?"
CRON = re.compile(
    rf"@(hourly|daily|weekly|monthly|yearly|annually|midnight)|{CRON_FIELD}(,{CRON_FIELD})*( {CRON_FIELD}(,{CRON_FIELD})*){{4}}"
)
MAX_ANNOTATIONS_BYTES = 256 << 10
MAX_FILES_BYTES = 1 << 20
MAX_CRONJOB_CHARS = 52


def object_problems(document: Document) -> list[str]:
    """Everything that is wrong with one object beside its pods, a line each with its path."""
    found = list(_metadata(document))
    kind = str(document.get("kind"))
    if kind in TEMPLATES and kind != "CronJob":
        found += _workload(document, kind)
    check = CHECKS.get(kind)
    return found + list(check(document) if check else ())


def _metadata(document: Document) -> Iterator[str]:
    metadata = document.get("metadata", {})
    name = metadata.get("name")
    if not SUBDOMAIN.fullmatch(str(name)):
        yield f"metadata.name: {name!r} is no name of an object"
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    for where, pairs in (("labels", labels), ("annotations", annotations)):
        yield from (f"metadata.{where}: {key!r} is no key" for key in pairs if not KEY.fullmatch(str(key)))
        yield from (
            f"metadata.{where}.{key}: a string is needed, found {value!r}" for key, value in pairs.items() if not isinstance(value, str)
        )
    yield from (f"metadata.labels.{key}: {value!r} is no label" for key, value in labels.items() if not VALUE.fullmatch(str(value)))
    if sum(len(key) + len(str(value)) for key, value in annotations.items()) > MAX_ANNOTATIONS_BYTES:
        yield "metadata.annotations: larger than 256 KiB"


def _workload(document: Document, kind: str) -> Iterator[str]:
    spec = document["spec"]
    template = find(document, TEMPLATES[kind]) or {}
    labels, policy = template.get("metadata", {}).get("labels", {}), template.get("spec", {}).get("restartPolicy", "Always")
    yield from (
        f"template.metadata.labels.{key}: {value!r} is no label" for key, value in labels.items() if not VALUE.fullmatch(str(value))
    )
    if kind == "Job":
        if policy not in ("Never", "OnFailure"):
            yield f"spec.template.spec.restartPolicy: {policy!r} is not one of Never, OnFailure"
        yield from (f"spec.{line}" for line in _failure_policy(spec))
        return
    if policy != "Always":
        yield f"spec.template.spec.restartPolicy: {policy!r} is not Always"
    selector = spec.get("selector") or {}
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        yield "spec.selector: an empty one is refused"
    elif not matches(selector, labels):
        yield "spec.selector: does not match the labels of its own template"
    update = spec.get("strategy") or spec.get("updateStrategy") or {}
    rolling = update.get("rollingUpdate") or {}
    if update.get("type") == "Recreate" and rolling:
        yield "spec.strategy.rollingUpdate: not beside Recreate"
    if str(rolling.get("maxSurge", 1)) in ("0", "0%") and str(rolling.get("maxUnavailable", 1)) in ("0", "0%"):
        yield "spec.strategy.rollingUpdate: maxSurge and maxUnavailable are both 0"


def _failure_policy(spec: Mapping[str, Any]) -> Iterator[str]:
    pod = spec.get("template", {}).get("spec", {})
    rules = (spec.get("podFailurePolicy") or {}).get("rules", ())
    if rules and pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy: needs restartPolicy Never"
    names = {container["name"] for container in [*pod.get("containers", ()), *pod.get("initContainers", ())]}
    for index, rule in enumerate(rules):
        codes = rule.get("onExitCodes")
        if (codes is None) == (not rule.get("onPodConditions")):
            yield f"podFailurePolicy.rules[{index}]: onExitCodes or onPodConditions is needed, one of them"
        if codes and (codes["values"] != sorted(set(codes["values"])) or (codes["operator"] == "In" and 0 in codes["values"])):
            yield f"podFailurePolicy.rules[{index}].onExitCodes.values: ordered, each once and not 0, found {codes['values']}"
        if codes and codes.get("containerName", next(iter(names), None)) not in names:
            yield f"podFailurePolicy.rules[{index}].onExitCodes.containerName: no container {codes['containerName']!r}"


def _cron_job(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if len(document["metadata"]["name"]) > MAX_CRONJOB_CHARS:
        yield f"metadata.name: longer than {MAX_CRONJOB_CHARS} characters, which leaves none for the Jobs' names"
    if not CRON.fullmatch(str(spec.get("schedule"))):
        yield f"spec.schedule: {spec.get('schedule')!r} is no cron time"
    if spec.get("timeZone") and spec["timeZone"] not in zoneinfo.available_timezones():
        yield f"spec.timeZone: {spec['timeZone']!r} is no time zone"
    job = spec["jobTemplate"]["spec"]
    policy = job["template"]["spec"].get("restartPolicy", "Always")
    if policy not in ("Never", "OnFailure"):
        yield f"spec.jobTemplate.spec.template.spec.restartPolicy: {policy!r} is not one of Never, OnFailure"
    yield from (f"spec.jobTemplate.spec.{line}" for line in _failure_policy(job))


def _service(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if not SERVICE_NAME.fullmatch(document["metadata"]["name"]):
        yield f"metadata.name: {document['metadata']['name']!r} is no name of a Service"
    ports = spec.get("ports", ())
    if not ports and spec.get("clusterIP") != "None":
        yield "spec.ports: at least one is needed"
    if len(ports) > 1 and not all(port.get("name") for port in ports):
        yield "spec.ports: each needs a name where there are several"
    yield from (f"spec.ports: {identity} is there twice" for identity in twins(ports, "port", "protocol"))
    yield from (f"spec.ports: {name!r} is there twice" for name in twins(ports, "name") if name)
    for port in ports:
        target = port.get("targetPort", port["port"])
        if isinstance(target, str) and not PORT_NAME.fullmatch(target):
            yield f"spec.ports: {target!r} is no name of a port"


def _ingress(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if not spec.get("rules") and not spec.get("defaultBackend"):
        yield "spec: rules or a defaultBackend are needed"
    hosts = [rule.get("host") for rule in spec.get("rules", ())] + [host for tls in spec.get("tls", ()) for host in tls.get("hosts", ())]
    yield from (f"spec: {host!r} is no name of a host" for host in hosts if host is not None and not HOST.fullmatch(host))
    for rule in spec.get("rules", ()):
        for path in rule.get("http", {}).get("paths", ()):
            if path.get("pathType") in ("Exact", "Prefix") and not str(path.get("path", "")).startswith("/"):
                yield f"spec.rules: {path.get('path')!r} does not begin with /"
            if len(path.get("backend", {}).get("service", {}).get("port", {})) != 1:
                yield "spec.rules: a backend's port has a name or a number, one of them"


def _budget(document: Document) -> Iterator[str]:
    if len({"minAvailable", "maxUnavailable"} & set(document["spec"])) != 1:
        yield "spec: minAvailable or maxUnavailable is needed, one of them"


def _scaler(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if spec.get("minReplicas", 1) > spec["maxReplicas"] or spec.get("minReplicas", 1) < 1:
        yield f"spec.minReplicas: {spec.get('minReplicas')} is not within 1 and maxReplicas {spec['maxReplicas']}"
    for index, metric in enumerate(spec.get("metrics", ())):
        kind = metric["type"][0].lower() + metric["type"][1:]
        target = metric.get(kind, {}).get("target", {})
        if set(metric) != {"type", kind} or len({"value", "averageValue", "averageUtilization"} & set(target)) != 1:
            yield f"spec.metrics[{index}]: one {kind} with one target is needed"


def _network_policy(document: Document) -> Iterator[str]:
    spec = document["spec"]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        if spec.get(direction) and direction.capitalize() not in spec.get("policyTypes", ()):
            yield f"spec.{direction}: without effect, policyTypes lacks {direction.capitalize()}"
        for rule in spec.get(direction) or ():
            for peer in rule.get(peers, ()):
                if not peer or ("ipBlock" in peer and len(peer) > 1):
                    yield f"spec.{direction}: a peer is an ipBlock or selectors, found {sorted(peer)}"
                yield from (f"spec.{direction}: {line}" for line in _block(peer.get("ipBlock")))


def _block(block: Mapping[str, Any] | None) -> Iterator[str]:
    if block is None:
        return
    try:
        whole = ipaddress.ip_network(block["cidr"])
        inside = [ipaddress.ip_network(each).subnet_of(whole) for each in block.get("except", ())]  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        yield f"ipBlock: {error}"
        return
    if not all(inside):
        yield f"ipBlock: an exception is not within {whole}"


def _files(document: Document) -> Iterator[str]:
    files = {**document.get("data", {}), **document.get("binaryData", {})}
    yield from (f"data: {key!r} is no name of a file" for key in files if not FILE_KEY.fullmatch(key))
    size = sum(len(key.encode()) + len(str(value).encode()) for key, value in files.items())
    if size > MAX_FILES_BYTES:
        yield f"data: {size} bytes, 1 MiB at most"


def _claim(document: Document) -> Iterator[str]:
    spec = document["spec"]
    storage = find(spec, ("resources", "requests", "storage"))
    if not spec.get("accessModes") or not QUANTITY.fullmatch(str(storage)):
        yield f"spec: accessModes and a size are needed, found {spec.get('accessModes')} and {storage!r}"


def _role(document: Document) -> Iterator[str]:
    for index, rule in enumerate(document.get("rules") or ()):
        if not rule.get("verbs") or not (rule.get("nonResourceURLs") or (rule.get("resources") and "apiGroups" in rule)):
            yield f"rules[{index}]: verbs, and resources with their apiGroups, are needed"
        if "*" in [*rule.get("verbs", ()), *rule.get("resources", ()), *rule.get("apiGroups", ())]:
            yield f"rules[{index}]: a wildcard is more than least privilege"


CHECKS: dict[str, Callable[[Document], Iterator[str]]] = {
    "ConfigMap": _files,
    "CronJob": _cron_job,
    "HorizontalPodAutoscaler": _scaler,
    "Ingress": _ingress,
    "NetworkPolicy": _network_policy,
    "PersistentVolumeClaim": _claim,
    "PodDisruptionBudget": _budget,
    "Role": _role,
    "ClusterRole": _role,
    "Secret": _files,
    "Service": _service,
}
