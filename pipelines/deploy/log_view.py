"""`slipway logs`: the lines of all pods of a deployment, each with the pod that printed it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from infra.errors import ConfigError, SlipwayError
from pipelines.cluster.client import Cluster
from pipelines.cluster.inventory import LABEL
from pipelines.cluster.logs import follow_logs, last_lines
from pipelines.cluster.refs import Ref, ref_of

COMPONENT = "app.kubernetes.io/component"
LOOK_AGAIN_S = 3.0
Source = tuple[str, str]
"""A pod and a container of it."""


def recent(cluster: Cluster, deployment: str, component: str | None, num_lines: int, previous: bool) -> Iterator[str]:
    """The last lines of every container, of the run before its last restart if `previous`. Raises ConfigError where there is no pod."""
    pods = _pods(cluster, deployment, component)
    if not pods:
        wanted = f" of the component {component}" if component else ""
        raise ConfigError(
            f"{deployment}: no pod{wanted} in namespace {cluster.namespace}. `slipway status {deployment}` shows what is there."
        )
    for pod in pods:
        for container in _containers(pod):
            for line in last_lines(cluster, ref_of(pod), container, num_lines, previous).splitlines():
                yield _marked((ref_of(pod).name, container), line)


def followed(cluster: Cluster, deployment: str, component: str | None) -> Iterator[str]:
    """The lines of every container from its start on, of pods that come later too, as they are printed. Never ends by itself."""
    lines: queue.Queue[str | SlipwayError] = queue.Queue()
    known: set[Source] = set()
    while True:
        for pod in _pods(cluster, deployment, component):
            for container in _containers(pod):
                source = (str(pod["metadata"]["uid"]), container)
                if source not in known:
                    known.add(source)
                    threading.Thread(target=_read, args=(cluster, ref_of(pod), container, lines), daemon=True).start()
        yield from _arriving(lines)


def _arriving(lines: queue.Queue[str | SlipwayError]) -> Iterator[str]:
    """Lines until there is none for `LOOK_AGAIN_S`. Raises the error that a reader ended by."""
    while True:
        try:
            line = lines.get(timeout=LOOK_AGAIN_S)
        except queue.Empty:
            return
        if isinstance(line, SlipwayError):
            raise line
        yield line


def _read(cluster: Cluster, pod: Ref, container: str, lines: queue.Queue[str | SlipwayError]) -> None:
    try:
        for line in follow_logs(cluster, pod, container):
            if line is not None:
                lines.put(_marked((pod.name, container), line))
    except SlipwayError as error:
        lines.put(error)


def _pods(cluster: Cluster, deployment: str, component: str | None) -> list[dict[str, Any]]:
    labels = {LABEL: deployment, **({COMPONENT: component} if component else {})}
    return sorted(cluster.find("v1", "Pod", labels), key=lambda pod: str(pod["metadata"]["name"]))


def _containers(pod: Mapping[str, Any]) -> list[str]:
    spec = pod.get("spec") or {}
    return [each["name"] for key in ("initContainers", "containers") for each in spec.get(key) or ()]


def _marked(source: Source, line: str) -> str:
    return f"[{source[0]} {source[1]}] {line}"
