"""One replica in simulated time: it reads prompts one after the other, and makes a token for every stream in each step.

What is left out: caches of prompts, the network, the noise of a shared machine.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from serving.autoscaling.load import RecentTimes, ReplicaLoad
from serving.autoscaling.traces import Request


@dataclass(frozen=True)
class Speed:
    """What a replica can do; the defaults were measured on two cores with OpenVINO, a model of 135 M parameters in INT8."""

    tokens_per_s: tuple[tuple[int, float], ...] = ((1, 102.0), (4, 414.0), (16, 853.0), (32, 1066.0))
    """Streams, and the tokens of all of them together; between these a straight line, beyond the last no more."""
    prompt_tokens_per_s: float = 5000.0
    """Prompts were read six times as fast as sixteen streams were written."""
    cold_start_s: float = 5.3
    """From asking for a replica to its first answer."""
    num_places: int = 64
    num_seats: int = 256

    def step_s(self, num_streams: int) -> float:
        """Time of one step."""
        (first, rate), *_ = self.tokens_per_s
        if num_streams <= first:
            return num_streams / rate
        for (low, low_rate), (high, high_rate) in pairwise(self.tokens_per_s):
            if num_streams <= high:
                return num_streams / (low_rate + (high_rate - low_rate) * (num_streams - low) / (high - low))
        return num_streams / self.tokens_per_s[-1][1]


@dataclass(eq=False)
class Machine:
    """A replica; `advance` it to a time before anything is asked of it at that time."""

    speed: Speed
    number: int
    ready_s: float
    now_s: float = 0.0
    is_leaving: bool = False
    """It takes nothing new and goes when its answers have ended."""
    _waiting: deque[tuple[float, Request]] = field(default_factory=deque)
    """Those without a place, and when they came to this replica."""
    _reading: deque[tuple[float, Request]] = field(default_factory=deque)
    _read_s: float = math.inf
    """When the prompt in front will have been read."""
    gaps_s: list[float] = field(default_factory=list)
    """For each answer that has ended, the mean time between its tokens."""
    _writing: list[tuple[float, int, float, int]] = field(default_factory=list)
    """The streams, by the value of `_written` at which each ends; its number, when it began, and its tokens after the first."""
    _written: float = 0.0
    """Tokens that a stream would have got if it had been there from the start."""
    _num_read: int = 0

    def __post_init__(self) -> None:
        self._recent = RecentTimes(lambda: self.now_s)

    @property
    def num_requests(self) -> int:
        """Requests in hand."""
        return len(self._waiting) + self._num_running

    @property
    def num_unanswered(self) -> int:
        """Requests that have no token yet."""
        return len(self._waiting) + len(self._reading)

    @property
    def _num_running(self) -> int:
        return len(self._reading) + len(self._writing)

    @property
    def next_s(self) -> float:
        """When something will happen in it by itself."""
        if self._reading:
            return self._read_s
        if self._writing:
            return self.now_s + max(0.0, self._writing[0][0] - self._written) * self.speed.step_s(len(self._writing))
        return math.inf

    def take(self, request: Request) -> bool:
        """Takes a request in; False where the queue is full."""
        if self._num_running >= self.speed.num_places and len(self._waiting) >= self.speed.num_seats:
            return False
        self._waiting.append((self.now_s, request))
        self._admit()
        return True

    def advance(self, now_s: float) -> list[float]:
        """Lets time pass until `now_s`, at most `next_s`; the times to the first token of those that got it now."""
        firsts_s: list[float] = []
        if not self._reading and self._writing:
            self._written += (now_s - self.now_s) / self.speed.step_s(len(self._writing))
        self.now_s = now_s
        if self._reading and now_s >= self._read_s:
            came_s, request = self._reading.popleft()
            self._recent.note(now_s - came_s)
            firsts_s.append(now_s - request.arrival_s)
            self._num_read += 1
            num_more = request.output_tokens - 1
            heapq.heappush(self._writing, (self._written + num_more, self._num_read, now_s, num_more))
            self._start_reading()
        while self._writing and not self._reading and self._writing[0][0] <= self._written + 1e-6:
            _, _, begun_s, num_more = heapq.heappop(self._writing)
            if num_more:
                self.gaps_s.append((now_s - begun_s) / num_more)
        self._admit()
        return firsts_s

    def load(self) -> ReplicaLoad:
        """What a replica would tell of itself now."""
        longest_wait_s = self.now_s - self._waiting[0][0] if self._waiting else 0.0
        return ReplicaLoad(self._num_running, len(self._waiting), longest_wait_s, *self._recent.figures())

    def _admit(self) -> None:
        while self._waiting and self._num_running < self.speed.num_places:
            self._reading.append(self._waiting.popleft())
            if len(self._reading) == 1:
                self._start_reading()

    def _start_reading(self) -> None:
        if self._reading:
            self._read_s = self.now_s + self.speed.step_s(1) + self._reading[0][1].prompt_tokens / self.speed.prompt_tokens_per_s
