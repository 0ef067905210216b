"""What an API server refuses in a pod's spec although the schema allows it, and what Restricted Pod Security adds.

- Duplicates in lists that server-side apply merges by key.
- References within the pod: a mount's volume, a probe's port.
- Numbers that must agree: requests and limits, grace and hooks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from infra.kube_types import amount
from tests.charts.pods import PodTemplate

KEY = re.compile(
    r"((?=[^/]{1,253}/)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
QUANTITY = re.compile(r"[+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?")
IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]*?(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@sha256:[0-9a-f]{64})?")
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
HANDLERS = {"exec", "httpGet", "tcpSocket", "grpc"}


def pod_problems(pod: PodTemplate) -> list[str]:
    """Everything that is wrong with one pod template, a line each with its path."""
    found = [*_names(pod), *_volumes(pod), *_placement(pod), *_restricted(pod)]
    for container in pod.containers:
        checks = (_image, _environment, _resources, _ports, _probes, _mounts, _confined)
        found += [f"containers[{container.get('name')}].{line}" for check in checks for line in check(container, pod)]
    return [f"{pod.path}.spec.{line}" for line in found]


def twins(items: Any, *keys: str) -> list[Any]:
    """What stands twice in a list, by its keys."""
    counted = Counter(tuple(item.get(key, "TCP" if key == "protocol" else None) for key in keys) for item in items or ())
    return [identity if len(keys) > 1 else identity[0] for identity, count in counted.items() if count > 1]


def _names(pod: PodTemplate) -> Iterator[str]:
    if not pod.spec.get("containers"):
        yield "containers: at least one is needed"
    for name in (str(container.get("name")) for container in pod.containers):
        if not LABEL.fullmatch(name):
            yield f"containers: {name!r} is no name of a container"
    yield from (f"containers: {name!r} is there twice" for name in twins(pod.containers, "name"))


def _volumes(pod: PodTemplate) -> Iterator[str]:
    volumes = pod.spec.get("volumes", ())
    yield from (f"volumes: {name!r} is there twice" for name in twins(volumes, "name"))
    for volume in volumes:
        sources = set(volume) - {"name"}
        if len(sources) != 1:
            yield f"volumes[{volume.get('name')}]: one source is needed, found {sorted(sources)}"
        elif not sources <= RESTRICTED_VOLUMES:
            yield f"volumes[{volume['name']}]: a restricted pod has no volume of type {sorted(sources)[0]}"
        if not LABEL.fullmatch(str(volume.get("name"))):
            yield f"volumes: {volume.get('name')!r} is no name of a volume"
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        if size is not None and not QUANTITY.fullmatch(str(size)):
            yield f"volumes[{volume['name']}].emptyDir.sizeLimit: {size!r} is no quantity"
    mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", ())}
    yield from (f"volumes[{volume['name']}]: no container mounts it" for volume in volumes if volume["name"] not in mounted)


def _placement(pod: PodTemplate) -> Iterator[str]:
    for index, toleration in enumerate(pod.spec.get("tolerations", ())):
        if toleration.get("key") and not KEY.fullmatch(toleration["key"]):
            yield f"tolerations[{index}]: {toleration['key']!r} is no key"
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield f"tolerations[{index}]: a value beside the operator Exists"
        if not toleration.get("key") and toleration.get("operator", "Equal") != "Exists":
            yield f"tolerations[{index}]: no key, which only Exists may lack"
        if toleration.get("tolerationSeconds") is not None and toleration.get("effect") != "NoExecute":
            yield f"tolerations[{index}]: tolerationSeconds needs the effect NoExecute"
    yield from (f"imagePullSecrets: {name!r} is there twice" for name in twins(pod.spec.get("imagePullSecrets"), "name"))
    grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in pod.containers:
        sleep_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep_s and sleep_s >= grace_s:
            yield f"containers[{container['name']}].lifecycle.preStop: sleeps {sleep_s} s, and the pod is killed after {grace_s} s"


def _restricted(pod: PodTemplate) -> Iterator[str]:
    yield from (f"{key}: a restricted pod does without" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(key))
    security = pod.spec.get("securityContext", {})
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "securityContext.seccompProfile: RuntimeDefault is needed"
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        yield "securityContext.runAsNonRoot: true is needed, and a user that is not 0"


def _confined(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    security = container.get("securityContext", {})
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True}
    for key, value in wanted.items():
        if security.get(key) is not value:
            yield f"securityContext.{key}: {str(value).lower()} is needed"
    if security.get("privileged"):
        yield "securityContext.privileged: a restricted pod does without"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security["capabilities"].get("add"):
        yield "securityContext.capabilities: all must be dropped"


def _image(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    found = IMAGE.fullmatch(str(container.get("image", "")))
    if found is None:
        yield f"image: {container.get('image')!r} is no reference of an image"
    elif found["tag"] in (None, "latest") and "@sha256:" not in container["image"]:
        yield f"image: {container['image']!r} has no version"


def _environment(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    yield from (f"env: {name!r} is there twice" for name in twins(container.get("env"), "name"))
    for variable in container.get("env", ()):
        if not re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", str(variable.get("name"))):
            yield f"env: {variable.get('name')!r} is no name of a variable"
        if "valueFrom" in variable and (variable.get("value") or len(variable["valueFrom"]) != 1):
            yield f"env[{variable['name']}]: one source is needed, found {sorted(set(variable) - {'name'})}"
        if "value" in variable and not isinstance(variable["value"], str):
            yield f"env[{variable['name']}].value: a string is needed, found {variable['value']!r}"


def _resources(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for where, named in (("requests", requests), ("limits", limits)):
        yield from (f"resources.{where}.{key}: {value!r} is no quantity" for key, value in named.items() if not _is_quantity(value))
    for key, asked in requests.items():
        if key in limits and _is_quantity(asked) and _is_quantity(limits[key]) and amount(asked) > amount(limits[key]):
            yield f"resources.requests.{key}: {asked} is more than the limit {limits[key]}"
        if "/" in key and requests[key] != limits.get(key):
            yield f"resources.requests.{key}: a device is asked for by an equal limit"
    yield from (f"resources.limits.{key}: a device is a whole one" for key in limits if "/" in key and not str(limits[key]).isdecimal())
    if not limits.get("memory") or not {**limits, **requests}.get("cpu"):
        yield "resources: a limit of memory and a request of CPU are needed"


def _ports(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    ports = container.get("ports", ())
    yield from (f"ports: {identity} is there twice" for identity in twins(ports, "containerPort", "protocol"))
    yield from (f"ports: {name!r} is there twice" for name in twins(ports, "name") if name)
    for port in ports:
        if not 0 < int(port["containerPort"]) < 1 << 16:
            yield f"ports: {port['containerPort']} is no port"
        if "name" in port and not PORT_NAME.fullmatch(port["name"]):
            yield f"ports: {port['name']!r} is no name of a port"


def _probes(container: Mapping[str, Any], _: PodTemplate) -> Iterator[str]:
    declared = {port.get("name") for port in container.get("ports", ())} | {port["containerPort"] for port in container.get("ports", ())}
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(kind)
        if probe is None:
            continue
        handlers = HANDLERS & set(probe)
        if len(handlers) != 1:
            yield f"{kind}: one handler is needed, found {sorted(handlers)}"
        for handler in handlers - {"exec"}:
            if probe[handler].get("port") not in declared:
                yield f"{kind}.{handler}.port: {probe[handler].get('port')!r} is not one of {sorted(map(str, declared))}"
        if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"{kind}.successThreshold: 1 is needed"
        for key in ("periodSeconds", "timeoutSeconds", "failureThreshold"):
            if probe.get(key, 1) < 1:
                yield f"{kind}.{key}: {probe[key]} is below 1"


def _mounts(container: Mapping[str, Any], pod: PodTemplate) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
    mounts = container.get("volumeMounts", ())
    yield from (f"volumeMounts: {path!r} is there twice" for path in twins(mounts, "mountPath"))
    for mount in mounts:
        if mount["name"] not in volumes:
            yield f"volumeMounts: the pod has no volume {mount['name']!r}"
        if not str(mount["mountPath"]).startswith("/") or ":" in mount["mountPath"]:
            yield f"volumeMounts: {mount['mountPath']!r} is no path"


def _is_quantity(value: Any) -> bool:
    return not isinstance(value, bool) and QUANTITY.fullmatch(str(value)) is not None
