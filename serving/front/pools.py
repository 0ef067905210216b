"""Which pool of replicas gets a request: the cheapest that begins its answers in time, and the next one where it does not.

A pool that was too slow is tried again once nobody has waited for it for a while: what it was slow by may have gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby

from serving.front.replicas import Replica

RECENT_S = 10.0
WEIGHT = 0.3
"""Of the newest time in the mean: about the last three count."""


class FirstTokenTimes:
    """The time to the first token that each pool gives now; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._means: dict[str, tuple[float, float]] = {}

    def note(self, pool: str, duration_s: float) -> None:
        """Adds one that has just been seen."""
        mean_s = self.expected_s(pool) or duration_s
        self._means[pool] = (self._clock(), mean_s + WEIGHT * (duration_s - mean_s))

    def expected_s(self, pool: str) -> float:
        """The mean of the recent ones; 0 where there are none."""
        noted_s, mean_s = self._means.get(pool, (-RECENT_S, 0.0))
        return mean_s if self._clock() - noted_s < RECENT_S else 0.0


def cheapest_in_time(candidates: Sequence[Replica], times: FirstTokenTimes, target_ttft_s: float) -> Sequence[Replica]:
    """The replicas of the pool that should answer; all of them where there is one pool.

    A pool whose places are all taken is passed over, and one slower than the target too. Where no pool is left, the least busy of all
    replicas may be any one's.
    """
    if len({replica.standing.pool for replica in candidates}) == 1:
        return candidates
    by_price = sorted(candidates, key=lambda replica: (replica.price, replica.standing.pool))
    pools = [list(replicas) for _, replicas in groupby(by_price, key=lambda replica: replica.standing.pool)]
    roomy = [replicas for replicas in pools if any(replica.num_running < replica.standing.num_places for replica in replicas)]
    for replicas in roomy:
        if times.expected_s(replicas[0].standing.pool) <= target_ttft_s:
            return replicas
    return min(roomy, key=lambda replicas: times.expected_s(replicas[0].standing.pool), default=candidates)
