"""What a server checks in every object, and in the built-in kinds beyond their schemas.

No more than the rules by which charts and programs go wrong: names, labels, sizes, selectors, fields that may not change.
Source: kubernetes.io/docs/concepts/overview/working-with-objects/{names,labels}; pkg/apis/*/validation of kubernetes/kubernetes.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.cluster.kinds import Kind

Problem = tuple[str, str]
Object = dict[str, Any]
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SERVICE_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RBAC_NAME = re.compile(r"[^/%]+")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
MAX_ANNOTATIONS_BYTES = 256 << 10
MAX_DATA_BYTES = 1 << 20
MAX_OBJECT_BYTES = 3 << 19
NAMES = {"Service": (SERVICE_LABEL, 63), "Namespace": (DNS_LABEL, 63), "CronJob": (SUBDOMAIN, 52)} | dict.fromkeys(
    ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"), (RBAC_NAME, 253)
)
# Paths that an update may not change.
FIXED = {
    "Job": ("spec.template", "spec.selector", "spec.completionMode"),
    "Deployment": ("spec.selector",),
    "DaemonSet": ("spec.selector",),
    "ReplicaSet": ("spec.selector",),
    "StatefulSet": ("spec.selector", "spec.serviceName", "spec.volumeClaimTemplates", "spec.podManagementPolicy"),
    "PersistentVolumeClaim": ("spec.accessModes", "spec.storageClassName", "spec.volumeMode", "spec.selector"),
    "RoleBinding": ("roleRef",),
    "ClusterRoleBinding": ("roleRef",),
    "PriorityClass": ("value",),
    "Secret": ("type",),
    "CustomResourceDefinition": ("spec.scope", "spec.group", "spec.names.plural"),
}
HAS_TEMPLATE = ("Deployment", "DaemonSet", "ReplicaSet", "StatefulSet")


def problems(kind: Kind, item: Object, old: Object | None) -> list[Problem]:
    """What is wrong with an object, beyond its schema: the fields, and what is wrong with each."""
    found = [*_metadata(kind, item["metadata"])]
    if not kind.is_custom:
        found += _data(item) if kind.kind in ("Secret", "ConfigMap") else ()
        found += _templates(kind, item)
        found += _fixed(kind, item, old) if old is not None else ()
    if kind.kind == "PodDisruptionBudget" and {"minAvailable", "maxUnavailable"} <= item.get("spec", {}).keys():
        found.append(("spec", "Invalid value: minAvailable and maxUnavailable cannot be both set"))
    if kind.kind == "HorizontalPodAutoscaler" and item["spec"].get("minReplicas", 1) > item["spec"]["maxReplicas"]:
        found.append(("spec.maxReplicas", "Invalid value: must be greater than or equal to `minReplicas`"))
    return found


def is_too_large(item: Object) -> bool:
    """Whether the store behind the server would refuse the object: etcd takes 1.5 MiB a request."""
    return len(json.dumps(item, separators=(",", ":")).encode()) > MAX_OBJECT_BYTES


def set_defaults(kind: Kind, item: Object) -> None:
    """What the server fills in of which others make use, in built-in kinds."""
    spec = item.get("spec")
    if kind.kind == "Secret":
        for key, text in (item.pop("stringData", None) or {}).items():
            item.setdefault("data", {})[key] = base64.b64encode(text.encode()).decode()
        item.setdefault("type", "Opaque")
    if kind.kind in ("Deployment", "StatefulSet", "ReplicaSet") and spec:
        spec.setdefault("replicas", 1)
    if kind.kind == "Job" and spec:
        spec.setdefault("backoffLimit", 6)
        spec.setdefault("suspend", False)
    if kind.kind == "Namespace":
        item["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = item["metadata"]["name"]
        item.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        item.setdefault("status", {"phase": "Active"})


def _metadata(kind: Kind, metadata: Object) -> Iterator[Problem]:
    pattern, longest = NAMES.get(kind.kind, (SUBDOMAIN, 253)) if not kind.is_custom else (SUBDOMAIN, 253)
    name = metadata["name"]
    if not pattern.fullmatch(name) or len(name) > longest:
        yield (
            "metadata.name",
            f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must match {pattern.pattern} and have at most {longest}',
        )
    yield from _labels(metadata.get("labels") or {}, "metadata.labels")
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        if not LABEL_KEY.fullmatch(key):
            yield "metadata.annotations", f'Invalid value: "{key}": name part must match {LABEL_KEY.pattern}'
    if sum(len(key.encode()) + len(str(value).encode()) for key, value in annotations.items()) > MAX_ANNOTATIONS_BYTES:
        yield "metadata.annotations", f"Too long: may not be more than {MAX_ANNOTATIONS_BYTES} bytes"


def _labels(labels: Object, path: str) -> Iterator[Problem]:
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            yield path, f'Invalid value: "{key}": name part must match {LABEL_KEY.pattern}'
        if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
            yield path, f'Invalid value: "{value}": a valid label must be an empty string or match {LABEL_VALUE.pattern}'


def _data(item: Object) -> Iterator[Problem]:
    data, binary = item.get("data") or {}, item.get("binaryData") or {}
    for key in [*data, *binary]:
        if not DATA_KEY.fullmatch(key):
            yield f"data[{key}]", f'Invalid value: "{key}": a valid config key must match {DATA_KEY.pattern}'
    if item["kind"] == "Secret":
        binary, data = data, {}
    size = sum(len(text.encode()) for text in data.values())
    for key, text in binary.items():
        try:
            size += len(base64.b64decode(text, validate=True))
        except binascii.Error:
            yield f"data[{key}]", "Invalid value: illegal base64 data"
    if size > MAX_DATA_BYTES:
        yield "data" if item["kind"] == "Secret" else "", f"Too long: may not be more than {MAX_DATA_BYTES} bytes"


def _templates(kind: Kind, item: Object) -> Iterator[Problem]:
    spec = item.get("spec") or {}
    template = spec.get("template") if "template" in spec else (spec.get("jobTemplate") or {}).get("spec", {}).get("template")
    if not isinstance(template, dict):
        return
    labels = (template.get("metadata") or {}).get("labels") or {}
    yield from _labels(labels, "spec.template.metadata.labels")
    wanted = (spec.get("selector") or {}).get("matchLabels") or {}
    if kind.kind in HAS_TEMPLATE and (not wanted or not wanted.items() <= labels.items()):
        yield "spec.template.metadata.labels", f"Invalid value: {json.dumps(labels)}: `selector` does not match template `labels`"
    restart = (template.get("spec") or {}).get("restartPolicy", "Always")
    if kind.kind in ("Job", "CronJob") and restart not in ("OnFailure", "Never"):
        yield "spec.template.spec.restartPolicy", f'Unsupported value: "{restart}": supported values: "OnFailure", "Never"'
    if kind.kind in HAS_TEMPLATE and restart != "Always":
        yield "spec.template.spec.restartPolicy", f'Unsupported value: "{restart}": supported values: "Always"'


def _fixed(kind: Kind, item: Object, old: Object) -> Iterator[Problem]:
    for path in FIXED.get(kind.kind, ()):
        before, after = _at(old, path), _at(item, path)
        if before is not None and before != after:
            yield path, "Invalid value: field is immutable"
    if old.get("immutable") and any(item.get(key) != old.get(key) for key in ("data", "binaryData", "immutable")):
        yield "data", "Forbidden: field is immutable when `immutable` is set"


def _at(item: Any, path: str) -> Any:
    for key in path.split("."):
        item = item.get(key) if isinstance(item, dict) else None
    return item
