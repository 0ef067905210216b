"""The state of objects, and every change of it, for as long as one wants to know.

A list gives the state at a resourceVersion, and a watch the changes since. The watch is opened again from the last version seen when the
connection drops; when the server no longer remembers that version (410 Gone) a new list is compared with what was known, so that
no change is missed and none is told twice.
Source: kubernetes.io/docs/reference/using-api/api-concepts, "Efficient detection of changes".
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infra.errors import TransientError
from pipelines.cluster.client import Cluster, selector_query
from pipelines.cluster.refs import Ref
from pipelines.cluster.refusals import Answer, known_error
from pipelines.cluster.stream import lines_of, open_stream, pause

WATCH_S = 300
# The server ends a watch after WATCH_S; one that is silent for longer has lost its connection.
SILENCE_S = WATCH_S + 30.0
WATCH_QUERY = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_S)}
SHORT_S = 0.2
GONE = 410
State = Literal["present", "gone"]


@dataclass(frozen=True)
class Event:
    """An object that is new or has changed, or that is gone."""

    state: State
    live: dict[str, Any]
    """The object; where it is gone, as it was last seen."""


@dataclass
class _Known:
    """What has been told so far: each object by its uid, and the version of the whole."""

    version: str = ""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)

    def update(self, state: State, live: dict[str, Any]) -> Iterator[Event]:
        """The event, unless it is known; a version seen already comes again when a watch is opened again."""
        uid = live["metadata"]["uid"]
        before = self.objects.get(uid)
        if state == "gone":
            self.objects.pop(uid, None)
            if before is not None:
                yield Event("gone", live)
        elif before is None or before["metadata"]["resourceVersion"] != live["metadata"]["resourceVersion"]:
            self.objects[uid] = live
            yield Event("present", live)


def watch(
    cluster: Cluster,
    api_version: str,
    kind: str,
    *,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    namespace: str | None = None,
    idle_s: float = 1.0,
) -> Iterator[Event | None]:
    """Events of the objects of a kind, those of one name or with all the labels; first one for each that is there. None after each
    `idle_s` without an event, so that the caller can do other things or give up. Never ends by itself.

    Raises ConfigError where the server refuses, and TransientError when it was away for longer than the cluster's patience.
    """
    path = cluster.path(api_version, kind, namespace)
    query = {**selector_query(labels), **({"fieldSelector": f"metadata.name={name}"} if name else {})}
    known = _Known()
    while True:
        if not known.version:
            yield from _compare(cluster, path, api_version, kind, query, known)
        since = {**query, **WATCH_QUERY, "resourceVersion": known.version}
        opened = yield from open_stream(cluster, path, since, f"watch {kind}", silence_s=SILENCE_S, idle_s=idle_s, expected=(GONE,))
        if isinstance(opened, Answer):
            known.version = ""
            continue
        opened_s = time.monotonic()
        with lines_of(opened, idle_s) as lines:
            yield from _changes(lines, known, kind)
        if time.monotonic() - opened_s < SHORT_S:  # a proxy on the way that cuts each one at once is not to be asked without a pause
            yield from pause(SHORT_S, idle_s)


def watch_one(cluster: Cluster, ref: Ref, idle_s: float = 1.0) -> Iterator[Event | None]:
    """Events of one object: see `watch`. Where it is not there yet, the first event is its creation."""
    return watch(cluster, ref.api_version, ref.kind, name=ref.name, namespace=ref.namespace, idle_s=idle_s)


def _compare(cluster: Cluster, path: str, api_version: str, kind: str, query: Mapping[str, str], known: _Known) -> Iterator[Event]:
    """Reads the state anew, and tells what is not as it was known to be."""
    items, known.version = cluster.find_at(path, api_version, kind, query)
    present = {item["metadata"]["uid"] for item in items}
    for uid in [uid for uid in known.objects if uid not in present]:
        yield from known.update("gone", known.objects[uid])
    for item in items:
        yield from known.update("present", item)


def _changes(lines: Iterator[bytes | None], known: _Known, kind: str) -> Iterator[Event | None]:
    """Tells what a watch says until it ends; forgets the version where the server has."""
    for line in lines:
        if line is None:
            yield None
            continue
        event = json.loads(line)
        live = event["object"]
        if event["type"] == "ERROR":
            if live.get("code") != GONE:
                error = known_error(Answer(int(live.get("code") or 500), live), f"watch {kind}")
                if not isinstance(error, TransientError):
                    raise error
            known.version = ""
            return
        known.version = live["metadata"]["resourceVersion"]
        if event["type"] != "BOOKMARK":
            yield from known.update("gone" if event["type"] == "DELETED" else "present", live)
