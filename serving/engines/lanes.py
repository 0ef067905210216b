"""Two batches of one model, of which one guesses ahead; for a library that guesses for all requests of a batch or for none.

- A request stays in the batch where it began. So a change of mind takes as long as the running answers do; until then both take steps.
- The batch that guesses is never short of cache: a request goes there only where its prompt and longest answer fit beside all others.
  OpenVINO's look-up fails where it would have to put a request aside ("get_max_new_tokens() >= generated_and_verified_len").
- A small model guesses for greedy requests only: for a sampled one OpenVINO fails ("content_length <= prompt_ids.size() + ...").
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from serving.config import SpeculativeConfig
from serving.engines.base import Sampling
from serving.engines.child import Batch
from serving.engines.messages import News
from serving.speculation import Speculation

GUESSED_SHARE = 0.25
"""Of the cache, for the batch that guesses."""


@dataclass(slots=True)
class Request:
    """Where a request is, and what is to be known of it when it gets tokens."""

    is_guessing: bool
    num_blocks: int
    """Of the guessing batch's cache that are kept for it."""
    tokens_left: int
    has_begun: bool = False
    """Whether it has got a token, so that its prompt has been read."""


class Lanes:
    """The requests of both batches, by their numbers."""

    def __init__(self, plain: Batch, guessing: Batch, config: SpeculativeConfig, num_blocks: int, block_tokens: int) -> None:
        self._plain = plain
        self._guessing = guessing
        self._num_tokens = config.num_tokens
        self._takes_sampled = config.kind != "draft"
        self._speculation = Speculation(config.max_requests, config.min_acceptance)
        self._free_blocks = num_blocks
        self._block_tokens = block_tokens
        self._requests: dict[int, Request] = {}
        self._cancelled_blocks = 0
        """Those of requests whose cache is freed in the next step."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._plain.has_work or self._guessing.has_work

    @property
    def figures(self) -> tuple[int | float | None, ...]:
        """The values of `base.Figures`, as of the last step."""
        (running, waiting, usage, *_), (more_running, more_waiting, other_usage, *_) = self._plain.figures, self._guessing.figures
        share = (1 - GUESSED_SHARE) * (usage or 0) + GUESSED_SHARE * (other_usage or 0)
        return (running or 0) + (more_running or 0), (waiting or 0) + (more_waiting or 0), share, None, None, *self._speculation.counts

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where it is refused."""
        longest = len(prompt_ids) + sampling.max_tokens + self._num_tokens + 1
        num_blocks = -(-longest // self._block_tokens) + 1
        can_guess = num_blocks <= self._free_blocks and (self._takes_sampled or not sampling.temperature)
        is_guessing = can_guess and self._speculation.wants(len(self._requests) + 1)
        refused = (self._guessing if is_guessing else self._plain).add(number, prompt_ids, sampling)
        if refused is None:
            self._requests[number] = Request(is_guessing, num_blocks * is_guessing, sampling.max_tokens)
            self._free_blocks -= num_blocks * is_guessing
        return refused

    def cancel(self, number: int) -> None:
        """Forgets a request; the next step frees its cache."""
        if request := self._requests.pop(number, None):
            self._cancelled_blocks += request.num_blocks
            (self._guessing if request.is_guessing else self._plain).cancel(number)

    def clear(self) -> None:
        """Frees what the running requests hold."""
        self._plain.clear()
        self._guessing.clear()
        self._requests.clear()

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""
        num_requests, is_guessing, started_s = len(self._requests), self._what_it_tells, time.perf_counter()
        guessed = self._guessing.step() if self._guessing.has_work else []
        news = guessed + (self._plain.step() if self._plain.has_work else [])
        elapsed_s = time.perf_counter() - started_s
        drafts = [draft for one in guessed if (draft := self._draft(one))]
        self._speculation.note(num_requests, is_guessing, drafts, sum(len(ids) for _, ids, *_ in news), elapsed_s)
        self._free_blocks += self._cancelled_blocks
        self._cancelled_blocks = 0
        for one in news:
            self._take(one)
        return news

    @property
    def _what_it_tells(self) -> bool | None:
        """Whether the next step guesses; None where some requests do and some do not, or a prompt is still to be read."""
        ways = {request.is_guessing if request.has_begun else None for request in self._requests.values()}
        return ways.pop() if len(ways) == 1 else None

    def _draft(self, news: News) -> tuple[int, int] | None:
        """Tokens guessed and accepted: the library checks as many as are set, whatever it found."""
        number, ids, _, finish_reason, _ = news
        request = self._requests[number]
        num_made = len(ids) + (finish_reason == "stop")
        num_guessed = min(self._num_tokens, request.tokens_left - 1)
        if not request.has_begun or not num_made or num_guessed < 1:
            return None
        return num_guessed, min(num_made - 1, num_guessed)

    def _take(self, news: News) -> None:
        number, ids, _, finish_reason, refusal = news
        request = self._requests[number]
        request.has_begun = request.has_begun or bool(ids)
        request.tokens_left -= len(ids)
        if finish_reason or refusal:
            self._free_blocks += self._requests.pop(number).num_blocks
