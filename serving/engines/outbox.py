"""What requests got and the server has not been sent yet: tokens of several steps go out together, so that sending costs the steps less."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serving.engines.messages import News

# A message costs the server about as much for one token as for ten, so the more requests share the processor, the longer each collects:
# 32 get theirs at most every 64 ms, which nobody reads slower than.
REQUEST_SHARE_S = 0.002


class Outbox:
    """News by request, due once `interval_s` have passed since all were taken; a first token and an end are due at once, and go alone."""

    def __init__(self, interval_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._emptied_s = clock_s()
        self._held: dict[int, News] = {}
        self._begun: set[int] = set()
        self._urgent: set[int] = set()

    def put(self, news: Sequence[News]) -> None:
        """Joins these to what each request has not been sent yet."""
        for each in news:
            number = each[0]
            is_last = bool(each[3] or each[4])
            if is_last or number not in self._begun:
                self._urgent.add(number)
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
        self._urgent.discard(number)

    def take(self) -> list[News]:
        """What is due now, and is then no longer held."""
        now_s = self._clock_s()
        if now_s - self._emptied_s < max(self._interval_s, REQUEST_SHARE_S * len(self._held)):
            news = [self._held.pop(number) for number in self._urgent]
        else:
            news = list(self._held.values())
            self._held.clear()
            self._emptied_s = now_s
        self._urgent.clear()
        return news


def _joined(earlier: News, later: News) -> News:
    number, ids, logprobs, *_ = earlier
    _, later_ids, later_logprobs, finish_reason, refusal = later
    both = [*(logprobs or ()), *(later_logprobs or ())] if logprobs is not None or later_logprobs is not None else None
    return number, ids + later_ids, both, finish_reason, refusal
