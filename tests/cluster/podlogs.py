"""What the containers of pods printed, as a node keeps it."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator

Line = tuple[str, str]
FOLLOW_POLL_S = 0.1


class PodLogs:
    """Lines by namespace, pod and container; what is written for the container `""` is in the log of each."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._lines: dict[tuple[str, str, str], list[Line]] = {}

    def write(self, namespace: str, pod: str, container: str, text: str) -> None:
        """Adds lines, all printed now."""
        stamp = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S}.{time.time_ns() % 10**9:09d}Z"
        with self.changed:
            self._lines.setdefault((namespace, pod, container), []).extend((stamp, line) for line in text.splitlines())
            self.changed.notify_all()

    def read(self, namespace: str, pod: str, container: str, since: str, num_tail: int | None) -> list[Line]:
        """The lines that were printed since, the last `num_tail` of them."""
        with self.changed:
            keys = dict.fromkeys([(namespace, pod, ""), (namespace, pod, container)])
            lines = sorted((line for key in keys for line in self._lines.get(key, ()) if line[0] >= since), key=lambda line: line[0])
        return lines if num_tail is None else lines[len(lines) - num_tail :] if num_tail else []

    def follow(self, namespace: str, pod: str, container: str, since: str, has_ended: Callable[[], bool]) -> Iterator[list[Line]]:
        """The lines that were printed since, and those that come, until the container has ended."""
        num_given = 0
        while True:
            ended = has_ended()
            lines = self.read(namespace, pod, container, since, None)
            if len(lines) > num_given:
                yield lines[num_given:]
                num_given = len(lines)
                continue
            if ended:
                return
            with self.changed:
                self.changed.wait(FOLLOW_POLL_S)
