"""What requests got and the server has not been sent yet: tokens of several steps go out together, so that sending costs the steps less."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serving.engines.messages import News

# A message costs the server about as much for one token as for ten, so the more requests share the processor, the longer each collects:
# 32 get theirs at most every 64 ms, which nobody reads slower than.
REQUEST_SHARE_S = 0.002


class Outbox:
    """News by request, due once `interval_s` have passed since the last were taken; a first token and an end are due at once."""

    def __init__(self, interval_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._taken_s = clock_s()
        self._held: dict[int, News] = {}
        self._begun: set[int] = set()
        self._is_urgent = False

    def put(self, news: Sequence[News]) -> None:
        """Joins these to what each request has not been sent yet."""
        for each in news:
            number = each[0]
            is_last = bool(each[3] or each[4])
            self._is_urgent |= is_last or number not in self._begun
            if is_last:
                self._begun.discard(number)
            else:
                self._begun.add(number)
            held = self._held.get(number)
            self._held[number] = _joined(held, each) if held else each

    def forget(self, number: int) -> None:
        """Drops a request that was cancelled."""
        self._held.pop(number, None)
        self._begun.discard(number)

    @property
    def is_due(self) -> bool:
        """Whether what is held should go now."""
        if not self._held or self._is_urgent:
            return self._is_urgent
        return self._clock_s() - self._taken_s >= max(self._interval_s, REQUEST_SHARE_S * len(self._held))

    def take(self) -> list[News]:
        """All that is held, which is then no longer."""
        news = list(self._held.values())
        self._held.clear()
        self._taken_s, self._is_urgent = self._clock_s(), False
        return news


def _joined(earlier: News, later: News) -> News:
    number, ids, logprobs, *_ = earlier
    _, later_ids, later_logprobs, finish_reason, refusal = later
    both = [*(logprobs or ()), *(later_logprobs or ())] if logprobs is not None or later_logprobs is not None else None
    return number, ids + later_ids, both, finish_reason, refusal
