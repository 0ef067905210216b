"""Replays a trace in simulated time: thousands of requests in about a second, the same trace before any policy.

Discrete events: a request arrives, a prompt is read, an answer ends, a replica has started, figures are noted, sent, decided upon.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from serving.autoscaling.machine import Machine, Speed
from serving.autoscaling.scalers import Scaler
from serving.autoscaling.traces import Request, Trace

LOOP_S = 0.2  # Ray Serve's controller decides every 0.1 s, ours of one machine every 0.25, and takes some time for it
PATIENCE_S = 600.0  # after the end of a trace, for what has not been answered


@dataclass(frozen=True, slots=True)
class Change:
    """A decision that asked for another number of replicas."""

    time_s: float
    before: int
    after: int

    @property
    def is_wake(self) -> bool:
        """Whether there was none before."""
        return self.before == 0


@dataclass
class Outcome:
    """What came of one replay."""

    trace: Trace
    first_replicas: int
    first_tokens_s: list[float] = field(default_factory=list)
    """From arrival to first token, for every request that was answered."""
    num_refused: int = 0
    replica_s: float = 0.0
    """Seconds of all replicas, those starting and leaving too, until the end of the trace."""
    changes: list[Change] = field(default_factory=list)

    @property
    def turns(self) -> list[Change]:
        """The changes that went the other way than the one before."""
        return [change for last, change in pairwise(self.changes) if (change.after > change.before) != (last.after > last.before)]

    @property
    def reactions_s(self) -> list[float | None]:
        """For each burst that met fewer than two replicas: the time until the second was asked for; None where it never was."""
        found: list[float | None] = []
        for burst_s, end_s in pairwise([*self.trace.bursts_s, math.inf]):
            if self._target_at(burst_s) < 2:
                asked = (change.time_s - burst_s for change in self.changes if burst_s <= change.time_s < end_s and change.after >= 2)
                found.append(next(asked, None))
        return found

    def _target_at(self, time_s: float) -> int:
        return next((change.after for change in reversed(self.changes) if change.time_s < time_s), self.first_replicas)

    def summary(self, target_ttft_s: float) -> dict[str, Any]:
        """The figures that are compared; seconds."""
        times_s = sorted(self.first_tokens_s)
        answered = [reaction_s for reaction_s in self.reactions_s if reaction_s is not None]
        return {
            "reaction_s": round(max(answered), 2) if answered else None,
            "bursts": len(self.reactions_s),
            "bursts_answered": len(answered),
            "ttft_p50_s": round(statistics.median(times_s), 3),
            "ttft_p99_s": round(times_s[int(0.99 * (len(times_s) - 1))], 3),
            "within_target": round(sum(time_s <= target_ttft_s for time_s in times_s) / len(self.trace.requests), 4),
            "refused": self.num_refused,
            "replica_s": round(self.replica_s),
            "most_replicas": max((change.after for change in self.changes), default=self.first_replicas),
            "changes": len(self.changes),
            "turns": len(self.turns),
        }


class Simulation:
    """A trace, a scaler, and the replicas between them."""

    def __init__(self, trace: Trace, scaler: Scaler, speed: Speed, first_replicas: int = 1) -> None:
        self._trace = trace
        self._scaler = scaler
        self._speed = speed
        self._machines: list[Machine] = []
        self._num_started = 0
        self._held: deque[Request] = deque()
        self._chance = random.Random(trace.name)
        self._outcome = Outcome(trace, first_replicas)
        self._now_s = 0.0
        for _ in range(first_replicas):
            self._start(ready_s=0.0)

    def run(self) -> Outcome:
        """Replays it all."""
        requests = deque(self._trace.requests)
        due = {self._record: (0.0, self._scaler.record_s), self._push: (0.0, self._scaler.push_s), self._decide: (0.0, LOOP_S)}
        last_s = self._trace.duration_s + PATIENCE_S
        while self._now_s < self._trace.duration_s or (self._num_unanswered and self._now_s < last_s):
            arrival_s = requests[0].arrival_s if requests else math.inf
            self._advance(min([arrival_s, *(due_s for due_s, _ in due.values()), *self._times_s()]))
            while requests and requests[0].arrival_s <= self._now_s:
                self._arrive(requests.popleft())
            for action, (due_s, interval_s) in due.items():
                if due_s <= self._now_s:
                    due[action] = (due_s + interval_s, interval_s)
                    action()
        return self._outcome

    @property
    def _num_unanswered(self) -> int:
        return len(self._held) + sum(machine.num_unanswered for machine in self._machines)

    @property
    def _answering(self) -> list[Machine]:
        return [machine for machine in self._machines if machine.ready_s <= self._now_s and not machine.is_leaving]

    def _times_s(self) -> list[float]:
        """When something happens by itself."""
        return [machine.next_s if machine.ready_s <= self._now_s else machine.ready_s for machine in self._machines]

    def _advance(self, now_s: float) -> None:
        counted_s = max(0.0, min(now_s, self._trace.duration_s) - self._now_s)
        self._outcome.replica_s += counted_s * len(self._machines)
        self._now_s = now_s
        for machine in self._machines:
            self._outcome.first_tokens_s += machine.advance(now_s)
        self._machines = [machine for machine in self._machines if machine.num_requests or not machine.is_leaving]
        while self._held and self._answering:
            self._route(self._held.popleft())

    def _arrive(self, request: Request) -> None:
        if self._answering:
            self._route(request)
            return
        self._held.append(request)
        self._scaler.push(self._now_s)  # a handle that finds no replica sends its figures at once

    def _route(self, request: Request) -> None:
        """To the less busy of two replicas picked at random, as Ray Serve does."""
        answering = self._answering
        picked = self._chance.sample(answering, min(2, len(answering)))
        self._outcome.num_refused += not min(picked, key=lambda machine: machine.num_requests).take(request)

    def _record(self) -> None:
        self._scaler.record(self._now_s, len(self._held), {machine.number: machine.load() for machine in self._answering})

    def _push(self) -> None:
        self._scaler.push(self._now_s)

    def _decide(self) -> None:
        staying = [machine for machine in self._machines if not machine.is_leaving]
        num_wanted = self._scaler.decide(self._now_s, len(staying), [machine.number for machine in self._answering])
        if num_wanted == len(staying):
            return
        self._outcome.changes.append(Change(self._now_s, len(staying), num_wanted))
        for _ in range(num_wanted - len(staying)):
            self._start(self._now_s + self._speed.cold_start_s)
        for machine in reversed(staying[num_wanted:]):  # the newest go first, and of them those that have not started
            machine.is_leaving = True
            if machine.ready_s > self._now_s:
                self._machines.remove(machine)

    def _start(self, ready_s: float) -> None:
        self._machines.append(Machine(self._speed, self._num_started, ready_s, now_s=self._now_s))
        self._num_started += 1


def simulate(trace: Trace, scaler: Scaler, speed: Speed | None = None, first_replicas: int = 1) -> Outcome:
    """What becomes of `trace` where `scaler` decides."""
    return Simulation(trace, scaler, speed or Speed(), first_replicas).run()
