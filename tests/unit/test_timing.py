"""How an engine is timed: the same work for every model, and as many requests at once as are said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from infra.answers import Prompt
from serving.engines.base import Chunk, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.timing import Timed, latencies_s, measure, spread

PROMPTS = [Prompt(row=row, ids=(row + 1,), expected="") for row in range(5)]


class Counting(ScriptedEngine):
    """A scripted engine that notes how many requests it ever had at once."""

    most_at_once = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().generate(prompt_ids, sampling):
            self.most_at_once = max(self.most_at_once, self.figures.num_running)
            yield chunk


@pytest.mark.parametrize(("num_streams", "num_requests"), [(1, 3), (4, 12), (16, 48)])
def test_measure_keeps_the_number_of_streams_and_takes_prompts_in_turn(num_streams: int, num_requests: int) -> None:
    engine = Counting(range(100))
    figures = asyncio.run(measure(engine, PROMPTS, [num_streams], most_tokens=8))[str(num_streams)]
    assert engine.most_at_once == num_streams
    assert figures["requests"] == len(engine.seen) == num_requests
    assert {ids for ids, _ in engine.seen} == {prompt.ids for prompt in PROMPTS[:num_streams]}
    assert figures["tokens_per_s"] > 0


@pytest.mark.parametrize(("most_tokens", "made"), [(1000, 32), (8, 8)])
def test_measure_makes_as_many_tokens_of_every_model_whatever_would_stop_it(most_tokens: int, made: int) -> None:
    engine = ScriptedEngine(range(100))
    asyncio.run(measure(engine, PROMPTS, [1, 2], most_tokens))
    assert {(sampling.max_tokens, sampling.stop_ids) for _, sampling in engine.seen} == {(made, ())}


def test_time_of_a_token_leaves_out_the_first_one_which_the_prompt_costs() -> None:
    assert Timed(start_s=0, first_s=5, last_s=7, num_tokens=5).ms_per_token == 500
    assert Timed(start_s=0, first_s=5, last_s=5, num_tokens=1).ms_per_token == 5000


@pytest.mark.parametrize(("count", "rows"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_spread_takes_prompts_evenly_and_none_twice(count: int, rows: list[int]) -> None:
    assert [prompt.row for prompt in spread(PROMPTS, count)] == rows


def test_latencies_are_of_requests_that_are_alone() -> None:
    engine = Counting(range(100))
    found = asyncio.run(latencies_s(engine, PROMPTS, Sampling(max_tokens=4, stop_ids=(9,))))
    assert list(found) == [0, 1, 2, 3, 4]
    assert all(seconds > 0 for seconds in found.values())
    assert engine.most_at_once == 1
    assert {sampling.stop_ids for _, sampling in engine.seen} == {(9,)}
