"""A fixed number of replicas under a load, in simulated time; each event touches one replica, so hundreds of them take seconds.

The replicas are those that autoscaling is replayed on (`serving.autoscaling.machine`), and requests go to the less busy of two as there.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.autoscaling.machine import Machine, Speed
from serving.autoscaling.traces import Request

SAME_S = 1e-6  # two times that differ by less are one


@dataclass
class Replayed:
    """What became of the requests; seconds."""

    first_tokens_s: list[tuple[float, float]] = field(default_factory=list)
    """When each got its first token, and how long after it had come."""
    gaps_s: list[float] = field(default_factory=list)
    """For each answer, the mean time between its tokens."""
    num_refused: int = 0


class Fleet:
    """Replicas of one kind that are all ready."""

    def __init__(self, speed: Speed, num_replicas: int, seed: int = 0) -> None:
        self._machines = [Machine(speed, number, ready_s=0.0) for number in range(num_replicas)]
        self._due: list[tuple[float, int]] = []
        self._chance = random.Random(seed)
        self._replayed = Replayed()

    def replay(self, requests: Iterable[Request]) -> Replayed:
        """Answers all of them, in the order in which they come."""
        for request in requests:
            self._advance(request.arrival_s)
            picked = self._chance.sample(self._machines, min(2, len(self._machines)))
            machine = min(picked, key=lambda each: each.num_requests)
            self._note(machine.advance(request.arrival_s), request.arrival_s)
            self._replayed.num_refused += not machine.take(request)
            self._expect(machine)
        self._advance(float("inf"))
        self._replayed.gaps_s = [gap_s for machine in self._machines for gap_s in machine.gaps_s]
        return self._replayed

    def _advance(self, until_s: float) -> None:
        """Lets happen what happens by itself before `until_s`."""
        while self._due and self._due[0][0] <= until_s:
            planned_s, number = heapq.heappop(self._due)
            machine = self._machines[number]
            if machine.next_s > planned_s + SAME_S:  # it has been given more to do since; that is in the heap as well
                continue
            self._note(machine.advance(machine.next_s), machine.now_s)
            self._expect(machine)

    def _expect(self, machine: Machine) -> None:
        if machine.num_requests:
            heapq.heappush(self._due, (machine.next_s, machine.number))

    def _note(self, firsts_s: list[float], now_s: float) -> None:
        self._replayed.first_tokens_s += [(now_s, first_s) for first_s in firsts_s]
