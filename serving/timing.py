"""How fast an engine answers one request and several at once, told by the very model and prompts that are scored.

Every request makes the same number of tokens, stop tokens or not, so that a model that says less does not seem faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from infra.answers import Prompt
from infra.files import write_json_atomic
from serving.engines.base import Engine, Sampling

SPEED_NAME = "speed.json"
Speed = dict[str, dict[str, float]]
"""Figures by number of requests at once."""
TOKENS_PER_REQUEST = 32
ROUNDS = 3


@dataclass(frozen=True)
class Timed:
    """When a request was sent, and when its tokens came, in seconds of one clock."""

    start_s: float
    first_s: float
    last_s: float
    num_tokens: int

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from one token to the next; of a single token, from the request to it."""
        if self.num_tokens < 2:
            return 1e3 * (self.last_s - self.start_s)
        return 1e3 * (self.last_s - self.first_s) / (self.num_tokens - 1)


async def measure(engine: Engine, prompts: Sequence[Prompt], streams: Sequence[int], most_tokens: int) -> Speed:
    """Figures by number of requests at once: tokens/s of all together, and medians of ms a token and ms to the first one.

    Each is that of the best of ROUNDS rounds: other programs of the machine only ever make it slower. `most_tokens` is what fits behind the
    longest prompt.
    """
    num_tokens = min(TOKENS_PER_REQUEST, most_tokens)
    figures: Speed = {}
    for num_streams in streams:
        chosen = [prompts[number % len(prompts)] for number in range(num_streams)]
        rounds = [await _round(engine, chosen, num_tokens) for _ in range(ROUNDS)]
        fastest = max(each["tokens_per_s"] for each in rounds)
        shortest = {name: min(each[name] for each in rounds) for name in ("ms_per_token", "ttft_ms")}
        figures[str(num_streams)] = {"requests": num_streams * ROUNDS, "tokens_per_s": fastest, **shortest}
    return figures


async def _round(engine: Engine, prompts: Sequence[Prompt], num_tokens: int) -> dict[str, float]:
    """One request a stream, all at once."""
    started_s = time.perf_counter()
    timed = await asyncio.gather(*(_request(engine, prompt, num_tokens) for prompt in prompts))
    return {
        "tokens_per_s": sum(each.num_tokens for each in timed) / (time.perf_counter() - started_s),
        "ms_per_token": median(each.ms_per_token for each in timed),
        "ttft_ms": median(1e3 * (each.first_s - each.start_s) for each in timed),
    }


async def _request(engine: Engine, prompt: Prompt, max_tokens: int) -> Timed:
    start_s = time.perf_counter()
    first_s, num_tokens = None, 0
    async with aclosing(engine.generate(prompt.ids, Sampling(max_tokens=max_tokens))) as chunks:
        async for chunk in chunks:
            if chunk.ids and first_s is None:
                first_s = time.perf_counter()
            num_tokens += len(chunk.ids)
    end_s = time.perf_counter()
    return Timed(start_s, first_s or end_s, end_s, num_tokens)


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most `count` of the prompts, evenly over all: the first ones are often of one kind."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


async def latencies_s(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> dict[int, float]:
    """Seconds of each whole answer by row, of requests that have the engine to themselves."""
    found = {}
    for prompt in prompts:
        started_s = time.perf_counter()
        async with aclosing(engine.generate(prompt.ids, sampling)) as chunks:
            async for _ in chunks:
                pass
        found[prompt.row] = time.perf_counter() - started_s
    return found


def write_speed(folder: Path, figures: Speed) -> None:
    """Writes `speed.json`."""
    write_json_atomic(folder / SPEED_NAME, figures)
