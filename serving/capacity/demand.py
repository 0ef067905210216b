"""What is asked of a fleet: so many new tokens a second, and how soon answers must begin. The load is synthetic, and steady."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from pydantic import Field

from infra.config import Config
from serving.autoscaling.traces import ANSWER_TOKENS, PROMPT_TOKENS, Request

NUM_LENGTHS = 20_000  # lengths from which their means are told
LEAST_S = 30.0


@dataclass(frozen=True)
class Lengths:
    """What is usual of many requests."""

    mean_prompt: float
    mean_answer: float
    sorted_prompts: tuple[int, ...]


class Demand(Config):
    """A load, and what must hold under it."""

    tokens_per_s: float = Field(gt=0, le=10_000_000)
    """New tokens a second, of all answers together, at the busiest time."""
    ttft_s: float = Field(gt=0)
    """Seconds within which answers must begin."""
    share: float = Field(0.99, ge=0.5, le=0.999)
    """Share of the answers that must."""
    itl_s: float | None = Field(None, gt=0)
    """Most seconds between the tokens of the median answer; absent means that any will do."""
    prompt_tokens: int = Field(PROMPT_TOKENS[0], ge=1, le=1_000_000)
    """Tokens of the median prompt; lengths are spread as in the traces of `slipway bench autoscale`."""
    answer_tokens: int = Field(ANSWER_TOKENS[0], ge=1, le=1_000_000)
    """Tokens of the median answer."""
    spare: int = Field(1, ge=0, le=1000)
    """Replicas beyond those needed: as many may fail, or be replaced, at once."""

    @property
    def lengths(self) -> Lengths:
        """Of prompts and answers, in tokens."""
        return _lengths(self.prompt_tokens, self.answer_tokens)

    @property
    def requests_per_s(self) -> float:
        """How many requests a second make these tokens."""
        return self.tokens_per_s / self.lengths.mean_answer

    @property
    def longest_prompt(self) -> int:
        """The prompt that the share asked of the prompts does not exceed."""
        return self.lengths.sorted_prompts[int(self.share * (NUM_LENGTHS - 1))]

    def requests(self, num_requests: int, seed: int = 0) -> list[Request]:
        """At least so many, and at least half a minute of them; arrivals know nothing of each other."""
        chance = random.Random(f"demand {seed}")
        rate = self.requests_per_s
        made: list[Request] = []
        now_s = 0.0
        while len(made) < num_requests or now_s < LEAST_S:
            now_s += chance.expovariate(rate)
            made.append(_request(chance, now_s, self.prompt_tokens, self.answer_tokens))
        return made


@cache
def _lengths(prompt_tokens: int, answer_tokens: int) -> Lengths:
    chance = random.Random("lengths")
    made = [_request(chance, 0.0, prompt_tokens, answer_tokens) for _ in range(NUM_LENGTHS)]
    prompts = sorted(request.prompt_tokens for request in made)
    return Lengths(sum(prompts) / NUM_LENGTHS, sum(request.output_tokens for request in made) / NUM_LENGTHS, tuple(prompts))


def _request(chance: random.Random, arrival_s: float, prompt_tokens: int, answer_tokens: int) -> Request:
    return Request(arrival_s, _length(chance, prompt_tokens, PROMPT_TOKENS), _length(chance, answer_tokens, ANSWER_TOKENS))


def _length(chance: random.Random, median: int, shape: tuple[int, float, int]) -> int:
    """A length around `median`, spread as `shape` is: its median, the sigma of the logarithm, and the most."""
    usual, sigma, most = shape
    return max(1, min(most * median // usual, round(chance.lognormvariate(math.log(median), sigma))))
