"""Who gets in, and when: a bounded queue in front of the engine, shared fairly among API keys.

- A smaller `priority` goes first, as in vLLM; within one priority the key that has used fewest tokens for its weight goes first.
- Tokens are counted as they are made, so nobody pays for what a request might have needed, nor for one that left while it waited.
- A full queue refuses the newcomer, or in its place the last to come of whoever holds more than a fair part of the queue.

Source: virtual token counters, Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain

from serving.errors import ApiError

RETRY_AFTER_S = (1, 60)
DURATION_WEIGHT = 0.1  # of the newest request in the mean duration: the last ten or so decide it


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request is judged by."""

    key: str
    """Whose share it counts against."""
    weight: float
    """Share of this key beside the others'."""
    priority: int
    """Smaller goes first."""
    num_prompt: int
    """Tokens it uses as soon as it runs."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits or runs."""

    claim: Claim
    admitted: asyncio.Future[None] | None = None
    arrived_s: float = 0.0
    waited_s: float = 0.0
    has_place: bool = False


class FairQueue:
    """Tickets in the order in which they are to run; it knows nothing of time or of asyncio."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str], dict[Ticket, None]] = {}
        self._used: defaultdict[str, float] = defaultdict(float)
        self._last_key = ""
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Ticket]:
        return chain.from_iterable(self._waiting.values())

    def push(self, ticket: Ticket) -> None:
        """Takes a ticket in. A key that had none waiting starts level with the others: it has saved nothing up while it was away."""
        claim = ticket.claim
        waiting_keys = {key for _, key in self._waiting}
        if claim.key not in waiting_keys:
            level = min((self._used[key] for key in waiting_keys), default=self._used[self._last_key])
            self._used[claim.key] = max(self._used[claim.key], level)
        self._waiting.setdefault((claim.priority, claim.key), {})[ticket] = None
        self._num_waiting += 1

    def pop(self) -> Ticket:
        """The ticket that is to run next; the queue holds at least one."""
        priority = min(priority for priority, _ in self._waiting)
        lanes = [key for lane_priority, key in self._waiting if lane_priority == priority]  # in the order in which they began to wait
        self._last_key = min(lanes, key=self._used.__getitem__)
        ticket = next(iter(self._waiting[priority, self._last_key]))
        self.remove(ticket)
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Forgets a ticket, if it waits."""
        lane = (ticket.claim.priority, ticket.claim.key)
        tickets = self._waiting.get(lane, {})
        if ticket not in tickets:
            return
        del tickets[ticket]
        self._num_waiting -= 1
        if not tickets:
            del self._waiting[lane]

    def charge(self, claim: Claim, num_tokens: int) -> None:
        """Counts tokens against the claim's key."""
        self._used[claim.key] += num_tokens / claim.weight

    def victim(self, claim: Claim) -> Ticket | None:
        """The ticket that should leave a full queue so that `claim` can wait; None where the newcomer itself is the one too many."""
        last = max(priority for priority, _ in self._waiting)
        if last < claim.priority:
            return None
        held = {key: list(tickets) for (priority, key), tickets in self._waiting.items() if priority == last}
        burdens = {key: len(tickets) / tickets[-1].claim.weight for key, tickets in held.items()}
        key = max(burdens, key=burdens.__getitem__)
        own = (len(held.get(claim.key, ())) + 1) / claim.weight
        return held[key][-1] if last > claim.priority or burdens[key] > own else None


class Gate:
    """Lets `num_places` requests run and `num_seats` more wait; `clock` gives seconds."""

    def __init__(self, num_places: int, num_seats: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_places = num_places
        self._num_seats = num_seats
        self._queue = FairQueue()
        self._duration_s = 0.0
        self.num_running = 0
        self.num_refused = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    @property
    def longest_wait_s(self) -> float:
        """How long the one that came first has been waiting for a place."""
        now_s = self._clock()
        return max((now_s - ticket.arrived_s for ticket in self._queue), default=0.0)

    @property
    def retry_after_s(self) -> int:
        """When a place in the queue will be free, by the time that the last requests took; whole seconds within `RETRY_AFTER_S`."""
        estimate_s = self._duration_s * (self.num_waiting + 1) / self._num_places
        return min(max(math.ceil(estimate_s), RETRY_AFTER_S[0]), RETRY_AFTER_S[1])

    @asynccontextmanager
    async def place(self, claim: Claim) -> AsyncIterator[Ticket]:
        """Holds a place while the block runs; leaving the wait gives the seat up. Raises ApiError 429 where the queue is full."""
        ticket = await self._enter(claim)
        started_s = self._clock()
        try:
            yield ticket
            self._note_duration(self._clock() - started_s)
        finally:
            self._leave()

    def charge(self, ticket: Ticket, num_tokens: int) -> None:
        """Counts tokens that a running request has made."""
        self._queue.charge(ticket.claim, num_tokens)

    async def _enter(self, claim: Claim) -> Ticket:
        if self.num_running >= self._num_places and self.num_waiting >= self._num_seats:
            self._make_room(claim)
        ticket = Ticket(claim, asyncio.get_running_loop().create_future(), self._clock())
        assert ticket.admitted is not None
        self._queue.push(ticket)
        self._admit()
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            self._queue.remove(ticket)
            if ticket.has_place:  # it was called in and cancelled at once
                self._leave()
            raise
        ticket.waited_s = self._clock() - ticket.arrived_s
        return ticket

    def _make_room(self, claim: Claim) -> None:
        self.num_refused += 1
        refusal = ApiError(
            f"{self.num_running} requests are running and {self.num_waiting} waiting, which is all this replica takes. "
            f"Retry in {self.retry_after_s} s.",
            429,
            code="rate_limit_exceeded",
            retry_after_s=self.retry_after_s,
        )
        victim = self._queue.victim(claim) if self.num_waiting else None
        if victim is None:
            raise refusal
        self._queue.remove(victim)
        if victim.admitted is not None and not victim.admitted.done():  # done: its client has just left
            victim.admitted.set_exception(refusal)

    def _admit(self) -> None:
        while self.num_waiting and self.num_running < self._num_places:
            ticket = self._queue.pop()
            if ticket.admitted is None or ticket.admitted.done():  # its client has just left
                continue
            self._queue.charge(ticket.claim, ticket.claim.num_prompt)
            ticket.has_place = True
            self.num_running += 1
            ticket.admitted.set_result(None)

    def _leave(self) -> None:
        self.num_running -= 1
        self._admit()

    def _note_duration(self, duration_s: float) -> None:
        weight = DURATION_WEIGHT if self._duration_s else 1.0
        self._duration_s += weight * (duration_s - self._duration_s)
