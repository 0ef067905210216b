"""What the containers of a pod print, line by line, over dropped connections.

Each line comes with the time at which it was printed, so that a stream that was cut goes on where it was: the server is asked for what is
newer than a whole second, and lines that were given already are passed over.
"""

from __future__ import annotations

import datetime
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import urllib3

from infra.errors import ConfigError
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from pipelines.cluster.refusals import Answer, known_error
from pipelines.cluster.stream import lines_of, open_stream, pause

# A program may print nothing for long; the connection is then opened again, and nothing is lost by it.
SILENCE_S = 600.0
NOT_YET = 400
ABSENT = 404
ASK_AGAIN_S = 0.5
Stamp = tuple[float, int]


@dataclass
class _Place:
    """How far a log has been given."""

    time: Stamp = (0.0, 0)
    """Of the last line: whole seconds since the epoch, and nanoseconds."""
    num_at_time: int = 0
    """How many lines of that time were given."""

    def fresh(self, lines: Iterator[bytes | None]) -> Iterator[str | None]:
        """The lines that come after this place, without their times; moves it on."""
        num_seen = 0
        for line in lines:
            stamp, text = _parted(line) if line is not None else (None, None)
            if stamp is None or stamp > self.time:
                if stamp is not None:
                    self.time, self.num_at_time, num_seen = stamp, 1, 1
                yield text
            elif stamp == self.time:
                num_seen += 1
                if num_seen > self.num_at_time:
                    self.num_at_time += 1
                    yield text


def follow_logs(cluster: Cluster, pod: Ref, container: str | None = None, idle_s: float = 1.0) -> Iterator[str | None]:
    """The lines of a pod's container from its start until it has ended, or the pod is gone; None after each `idle_s` without one.

    Waits for a container that has not started yet. Raises ConfigError where the server refuses, and TransientError when it was away for
    longer than the cluster's patience.
    """
    place = _Place()
    while True:
        had_ended = has_ended(cluster.get(pod), container)
        opened = yield from _open(cluster, pod, container, place, idle_s)
        if opened is not None:
            with lines_of(opened, idle_s) as lines:
                yield from place.fresh(lines)
        if had_ended:  # it had printed everything before it was asked for it
            return
        yield from pause(ASK_AGAIN_S, idle_s)


def last_lines(cluster: Cluster, pod: Ref, container: str | None = None, num_lines: int = 50, previous: bool = False) -> str:
    """The end of a container's log, of the run before the last restart if `previous`; empty where there is none."""
    query = {"tailLines": str(num_lines), "previous": str(previous).lower(), **({"container": container} if container else {})}
    try:
        response = cluster.send("GET", cluster.path_of(pod) + "/log", query, None, "application/json", SILENCE_S)
        return response.data.decode("utf-8", errors="replace") if response.status == 200 else ""
    except urllib3.exceptions.HTTPError:  # these lines are to explain an error, which must not wait for them
        return ""


def has_ended(pod: dict[str, Any] | None, container: str | None = None) -> bool:
    """Whether a pod's container, or each of them, has ended and will not start again, or the pod is gone."""
    if pod is None:
        return True
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return True
    is_final = (pod.get("spec") or {}).get("restartPolicy") == "Never"
    states = [entry.get("state") or {} for entry in status.get("containerStatuses") or [] if container in (None, entry["name"])]
    return is_final and bool(states) and all("terminated" in state for state in states)


def _open(
    cluster: Cluster, pod: Ref, container: str | None, place: _Place, idle_s: float
) -> Generator[None, None, urllib3.BaseHTTPResponse | None]:
    """Opens the log from a place; returns None where there is nothing to read yet, or no more."""
    query = {"follow": "true", "timestamps": "true", **({"container": container} if container else {})}
    if place.num_at_time:
        query["sinceTime"] = datetime.datetime.fromtimestamp(place.time[0], datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    path, purpose = cluster.path_of(pod) + "/log", f"read the log of {pod}"
    opened = yield from open_stream(cluster, path, query, purpose, silence_s=SILENCE_S, idle_s=idle_s, expected=(NOT_YET, ABSENT))
    if not isinstance(opened, Answer):
        return opened
    if opened.status == NOT_YET and "waiting to start" not in opened.message and "not been started" not in opened.message:
        error = known_error(opened, purpose)
        if isinstance(error, ConfigError):
            raise error
    return None


def _parted(line: bytes) -> tuple[Stamp | None, str]:
    """When a line was printed, and the line; no time where the server put a word of its own between."""
    text = line.decode("utf-8", errors="replace")
    stamp, _, rest = text.partition(" ")
    seconds, _, fraction = stamp.partition(".")
    digits = fraction.rstrip("Z").partition("+")[0].partition("-")[0]
    zone = fraction[len(digits) :] if fraction else ""
    try:
        whole = datetime.datetime.fromisoformat(seconds + zone)
    except ValueError:
        return None, text
    if whole.tzinfo is None:
        return None, text
    return (whole.timestamp(), int(digits.ljust(9, "0")[:9] or 0)), rest
