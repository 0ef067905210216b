"""Where requests are while some steps guess and some do not, with batches whose next token hangs on all that came before."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from serving.config import SpeculativeConfig
from serving.engines.base import Grammar, Sampling
from serving.engines.lanes import CALM_STEPS, Lanes
from serving.engines.messages import News

BLOCK_TOKENS, NUM_BLOCKS = 4, 40
GUESSES = SpeculativeConfig(num_tokens=3, max_requests=3, min_acceptance=0.0)


def next_id(ids: list[int]) -> int:
    return sum(place * token for place, token in enumerate(ids, 1)) % 101


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_id(ids))
    return ids[len(prompt) :]


class CountingBatch:
    """Gives each request `per_step` tokens a step, the first time one; what it may need of the cache is held until the step after."""

    def __init__(self, per_step: int, num_blocks: int | None = None) -> None:
        self.per_step = per_step
        self.num_blocks = num_blocks
        self.requests: dict[int, tuple[list[int], int, list[int]]] = {}
        self.leaving: list[int] = []
        self.num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.leaving)

    @property
    def figures(self) -> tuple[int, int, float]:
        return len(self.requests), 0, 0.5

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        if not prompt_ids:
            return number, [], None, None, "an empty prompt"
        assert number not in self.requests
        self.requests[number] = (list(prompt_ids), sampling.max_tokens, [])
        self.num_added += 1
        return None

    def cancel(self, number: int) -> None:
        ids, most, made = self.requests.pop(number)
        self.leaving.append(len(ids) + most - len(made))

    def step(self) -> list[News]:
        needs = [len(ids) + most - len(made) for ids, most, made in self.requests.values()]
        assert self.num_blocks is None or sum(-(-need // BLOCK_TOKENS) for need in needs + self.leaving) <= self.num_blocks
        self.leaving.clear()
        return [self._advance(number) for number in list(self.requests)]

    def _advance(self, number: int) -> News:
        ids, most, made = self.requests[number]
        new: list[int] = []
        for _ in range(min(self.per_step if made else 1, most - len(made))):
            new.append(next_id(ids))
            ids.append(new[-1])
            made.append(new[-1])
        if len(made) == most:
            del self.requests[number]
        return number, new, None, "length" if len(made) == most else None, None

    def clear(self) -> None:
        self.requests.clear()


def make_lanes(**config: Any) -> tuple[Lanes, CountingBatch, CountingBatch]:
    plain, guessing = CountingBatch(1), CountingBatch(3, NUM_BLOCKS)
    clock = itertools.count().__next__  # every step takes as long, so that guesses always pay
    return Lanes(plain, guessing, GUESSES.model_copy(update=config), NUM_BLOCKS, BLOCK_TOKENS, clock), plain, guessing


def steps(lanes: Lanes, num: int, made: dict[int, list[int]]) -> None:
    for _ in range(num):
        for number, ids, *_ in lanes.step():
            made.setdefault(number, []).extend(ids)


def test_answers_are_the_same_however_requests_come_and_go() -> None:
    """And the guessing batch is never short of cache, which it says itself."""
    chance = random.Random(3)
    lanes, plain, guessing = make_lanes()
    asked: dict[int, tuple[list[int], int]] = {}
    made: dict[int, list[int]] = {}
    cancelled = set()
    for number in range(400):
        prompt, most = [chance.randrange(90) for _ in range(chance.randrange(1, 20))], chance.randrange(1, 60)
        sampling = Sampling(max_tokens=most, frequency_penalty=float(number % 50 == 7))
        asked[number] = (prompt, most)
        assert lanes.add(number, prompt, sampling) is None
        if number % 9 == 0:
            lanes.cancel(number)
            cancelled.add(number)
        steps(lanes, chance.choice([0, 1, 5, 40, 80]), made)
        assert not (plain.requests and guessing.requests)
    while lanes.has_work:
        steps(lanes, 1, made)
    assert {number: made[number] for number in asked if number not in cancelled} == {
        number: expected(*asked[number]) for number in asked if number not in cancelled
    }
    assert lanes.figures[6] > lanes.figures[5] > 0  # type: ignore[operator]
    assert plain.num_added > 50
    assert guessing.num_added > 50


def test_request_among_too_many_goes_where_there_are_no_guesses_and_all_come_back_when_it_is_calm() -> None:
    lanes, plain, guessing = make_lanes()
    made: dict[int, list[int]] = {}
    for number in range(3):
        lanes.add(number, [number], Sampling(max_tokens=40))
    steps(lanes, 2, made)
    assert set(guessing.requests) == {0, 1, 2}
    lanes.add(3, [3], Sampling(max_tokens=5))
    assert set(plain.requests) == {0, 1, 2, 3}
    steps(lanes, 5 + CALM_STEPS, made)
    assert set(plain.requests) == {0, 1, 2}, "the fourth has ended, and they wait"
    steps(lanes, 1, made)
    assert set(guessing.requests) == {0, 1, 2}
    steps(lanes, 40, made)
    assert made == {number: expected([number], 5 if number == 3 else 40) for number in range(4)}


@pytest.mark.parametrize(
    "fixed",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"grammar": Grammar(kind="regex", text="a")},
        {"temperature": 1.0, "seed": 1},
    ],
)
def test_request_that_cannot_be_moved_keeps_all_where_there_are_no_guesses(fixed: dict[str, Any]) -> None:
    lanes, plain, _ = make_lanes()
    lanes.add(0, [1], Sampling(max_tokens=50))
    steps(lanes, 1, {})
    lanes.add(1, [2], Sampling(max_tokens=50, **fixed))
    assert set(plain.requests) == {0, 1}


@pytest.mark.parametrize(("kind", "sampling", "is_guessing"), [
    ("prompt_lookup", {"temperature": 1.0}, True),
    ("draft", {"temperature": 1.0}, False),
    ("draft", {}, True),
])  # fmt: skip
def test_small_model_guesses_for_greedy_requests_only(kind: str, sampling: dict[str, Any], is_guessing: bool) -> None:
    lanes, _, guessing = make_lanes(kind=kind)
    lanes.add(0, [1], Sampling(max_tokens=5, **sampling))
    assert bool(guessing.requests) is is_guessing


def test_requests_that_do_not_fit_together_are_answered_without_guesses() -> None:
    lanes, plain, guessing = make_lanes()
    room = NUM_BLOCKS * BLOCK_TOKENS
    lanes.add(0, [1] * 10, Sampling(max_tokens=room // 2))
    assert set(guessing.requests) == {0}
    lanes.add(1, [1] * 10, Sampling(max_tokens=room // 2))
    assert set(plain.requests) == {0, 1}


def test_refused_request_leaves_no_trace() -> None:
    lanes, _, _ = make_lanes()
    refused = lanes.add(0, [], Sampling(max_tokens=5))
    assert refused is not None
    assert refused[4] == "an empty prompt"
    assert not lanes.has_work
    assert lanes.add(0, [1], Sampling(max_tokens=5)) is None
