"""What one replica tells about itself, as plain numbers: Ray Serve carries them from the replicas to whoever decides."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

RECENT_S = 10.0
MAX_RECENT = 1000
MOST = 0.9  # share of the recent answers that began in time


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """The figures of one replica at one moment; the names are those that Ray Serve carries."""

    num_running: float = 0
    num_waiting: float = 0
    longest_wait_s: float = 0
    """How long the first in the queue has waited."""
    first_token_s: float = 0
    """Time to the first token that nine in ten of the recent answers kept to; 0 where there were none."""
    num_recent: float = 0
    """Answers begun in the last `RECENT_S` seconds, so that short requests between two looks are not taken for silence."""


class RecentTimes:
    """The times to the first token of the last `RECENT_S` seconds; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._noted: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)

    def note(self, duration_s: float) -> None:
        """Adds one that has just ended."""
        self._noted.append((self._clock(), duration_s))

    def figures(self) -> tuple[float, int]:
        """The time that nine in ten of those still recent kept to, 0 where there are none; and how many there are."""
        oldest_s = self._clock() - RECENT_S
        while self._noted and self._noted[0][0] < oldest_s:
            self._noted.popleft()
        times_s = sorted(duration_s for _, duration_s in self._noted)
        return (times_s[int(MOST * (len(times_s) - 1))] if times_s else 0.0), len(times_s)
