"""How many replicas there should be: a pure function of figures and of what it remembers, run unchanged by Ray Serve and by the simulator.

- Up at once to what the requests in hand need, or by one where they wait too long; down by one at a time, after a long while.
- A change of direction comes a minute after the last one at the earliest. Only waking from zero is exempt: nobody could answer meanwhile.
- Nothing goes down on guesses: not while a replica has told nothing yet, nor while answers are late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from serving.autoscaling.load import RECENT_S, ReplicaLoad
from serving.config import AutoscaleConfig

TURN_S = 60.0  # least time between two changes of direction
ROOM = 0.8  # of what the remaining replicas should have in hand, they may get this share when one goes: the next request must not recall it


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known at one moment."""

    now_s: float
    num_target: int
    """Replicas asked for so far."""
    num_replicas: int
    """Those that answer."""
    loads: tuple[ReplicaLoad, ...] = ()
    """What those tell that have told anything yet."""
    num_held: int = 0
    """Requests that no replica has yet, because none is there."""

    @property
    def num_requests(self) -> int:
        """Requests in hand."""
        return round(self.num_held + sum(load.num_running + load.num_waiting for load in self.loads))

    @property
    def is_idle(self) -> bool:
        """Whether nobody asks, nor has in the last seconds."""
        return not self.num_requests and not any(load.num_recent for load in self.loads)

    @property
    def wait_s(self) -> float:
        """How long a request waits for its first token: most of the recent ones at most this, or one that waits now already that long."""
        return max((max(load.first_token_s, load.longest_wait_s) for load in self.loads), default=0.0)


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one decision to the next; times are of the figures' clock."""

    num_target: int | None = None
    direction: int = 0
    """Of the last change: 1 up, -1 down, 0 none yet."""
    turned_s: float | None = None
    """When the direction last changed."""
    high_since_s: float | None = None
    """Since when more replicas are wanted than asked for."""
    low_since_s: float | None = None
    """Since when fewer are wanted."""
    complete_since_s: float | None = None
    """Since when every replica asked for answers."""


def decide(settings: AutoscaleConfig, state: State, figures: Figures) -> tuple[int, State]:
    """The number of replicas to ask for, and what to remember of it."""
    now_s, num_target = figures.now_s, figures.num_target
    if state.num_target not in (None, num_target):  # somebody else changed it: Ray woke the first replica, or the bounds are new
        state = _moved(state, now_s, num_target - (state.num_target or 0))
    if figures.num_held and not figures.num_replicas:  # as Ray Serve does without asking a policy: one replica first, at once
        return _asked(replace(state, high_since_s=None, low_since_s=None), now_s, num_target, max(1, num_target))
    wanted = min(max(wanted_replicas(settings, state, figures), settings.min_replicas), settings.max_replicas)
    state = replace(
        state,
        high_since_s=_since(state.high_since_s, now_s, wanted > num_target),
        low_since_s=_since(state.low_since_s, now_s, wanted < num_target),
        complete_since_s=_since(state.complete_since_s, now_s, figures.num_replicas >= num_target),
    )
    if _is_due(state.high_since_s, now_s, settings.up_delay_s) and _may_move(state, now_s, 1):
        return _asked(state, now_s, num_target, wanted)
    down_delay_s = settings.zero_delay_s if num_target == 1 else settings.down_delay_s
    if _is_due(state.low_since_s, now_s, down_delay_s) and _may_move(state, now_s, -1):
        return _asked(state, now_s, num_target, num_target - 1)
    return num_target, replace(state, num_target=num_target)


def wanted_replicas(settings: AutoscaleConfig, state: State, figures: Figures) -> int:
    """The number of replicas that the figures speak for, before bounds and delays."""
    num_target, num_requests = figures.num_target, figures.num_requests
    needed = math.ceil(num_requests / settings.target_requests)
    if needed < num_target:
        needed = min(num_target, math.ceil(num_requests / (settings.target_requests * ROOM)))
    # One request more than there are replicas, at the least: a long prompt alone is no faster beside another replica.
    is_late = figures.wait_s > settings.target_ttft_s and num_requests > figures.num_replicas
    if is_late:
        # One at a time: what is late now says nothing about replicas that have only just come, nor about those still starting.
        has_settled = _is_due(state.complete_since_s, figures.now_s, RECENT_S)
        needed = max(needed, num_target + 1 if has_settled else num_target)
    if len(figures.loads) < figures.num_replicas:
        needed = max(needed, num_target)
    return needed if figures.is_idle else max(1, needed)


def _since(since_s: float | None, now_s: float, is_true: bool) -> float | None:
    """When something that is true now became so."""
    return (now_s if since_s is None else since_s) if is_true else None


def _is_due(since_s: float | None, now_s: float, delay_s: float) -> bool:
    return since_s is not None and now_s - since_s >= delay_s


def _may_move(state: State, now_s: float, direction: int) -> bool:
    is_turn = state.direction == -direction
    return not is_turn or state.turned_s is None or now_s - state.turned_s >= TURN_S


def _asked(state: State, now_s: float, num_target: int, wanted: int) -> tuple[int, State]:
    """The decision for `wanted` replicas; after one the delays begin anew."""
    if wanted == num_target:
        return wanted, replace(state, num_target=wanted)
    state = _moved(state, now_s, wanted - num_target)
    return wanted, replace(state, num_target=wanted, high_since_s=None, low_since_s=None, complete_since_s=None)


def _moved(state: State, now_s: float, difference: int) -> State:
    direction = 1 if difference > 0 else -1
    is_turn = state.direction == -direction
    return replace(state, direction=direction, turned_s=now_s if is_turn else state.turned_s)
