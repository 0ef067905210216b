"""When tokens go from the engine's process to the server, and that none is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from serving.engines.messages import News
from serving.engines.outbox import REQUEST_SHARE_S, Outbox


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def tokens(number: int, *ids: int, end: str | None = None, logprobs: list[Any] | None = None) -> News:
    return number, list(ids), logprobs, end, None


def begun(interval_s: float, *numbers: int) -> tuple[Outbox, Clock]:
    """An outbox whose requests have been sent their first tokens."""
    clock = Clock()
    outbox = Outbox(interval_s, clock)
    clock.now_s += 1
    outbox.put([tokens(number, 1) for number in numbers])
    outbox.take()
    return outbox, clock


def test_outbox_with_nothing_in_it_gives_nothing() -> None:
    outbox, clock = begun(0.016, 1)
    clock.now_s += 1
    assert outbox.take() == []


def test_outbox_first_token_goes_at_once_and_leaves_others_their_time() -> None:
    outbox, clock = begun(0.016, 1)
    outbox.put([tokens(1, 2), tokens(2, 7)])
    assert outbox.take() == [tokens(2, 7)]
    clock.now_s += 0.017
    assert outbox.take() == [tokens(1, 2)]


def test_outbox_later_tokens_go_together_after_the_interval() -> None:
    outbox, clock = begun(0.016, 1)
    for token in (2, 3):
        clock.now_s += 0.007
        outbox.put([tokens(1, token)])
        assert outbox.take() == []
    clock.now_s += 0.007
    outbox.put([tokens(1, 4)])
    assert outbox.take() == [tokens(1, 2, 3, 4)]
    outbox.put([tokens(1, 5)])
    assert outbox.take() == []  # the interval begins anew


def test_outbox_without_an_interval_sends_each_token_by_itself() -> None:
    outbox, clock = begun(0.0, 1)
    clock.now_s += 1.5 * REQUEST_SHARE_S
    outbox.put([tokens(1, 2)])
    assert outbox.take() == [tokens(1, 2)]


def test_outbox_with_many_requests_waits_longer() -> None:
    outbox, clock = begun(0.016, *range(32))
    outbox.put([tokens(number, 2) for number in range(32)])
    clock.now_s += 0.06
    assert outbox.take() == []
    clock.now_s += 0.005
    assert len(outbox.take()) == 32


@pytest.mark.parametrize("last", [tokens(1, 3, end="stop"), (1, [], None, None, "larger than the cache")])
def test_outbox_end_goes_at_once_with_what_came_before(last: News) -> None:
    outbox, _ = begun(0.016, 1)
    outbox.put([tokens(1, 2)])
    outbox.put([last])
    assert outbox.take() == [(1, [2, *last[1]], None, last[3], last[4])]


def test_outbox_log_probabilities_stay_beside_their_tokens() -> None:
    outbox, _ = begun(0.016, 1)
    outbox.put([tokens(1, 2, logprobs=[(-0.1, ())])])
    outbox.put([tokens(1, 3, end="length", logprobs=[(-0.2, ())])])
    assert outbox.take() == [tokens(1, 2, 3, end="length", logprobs=[(-0.1, ()), (-0.2, ())])]


def test_outbox_cancelled_request_is_dropped_and_others_are_kept() -> None:
    outbox, clock = begun(0.016, 1, 2)
    outbox.put([tokens(1, 2), tokens(2, 2), tokens(3, 7)])
    outbox.forget(1)
    outbox.forget(3)
    assert outbox.take() == []
    clock.now_s += 0.017
    assert outbox.take() == [tokens(2, 2)]
    outbox.put([tokens(1, 9)])
    assert outbox.take() == [tokens(1, 9)]  # the number is a new request's
