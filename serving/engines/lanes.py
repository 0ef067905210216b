"""Two batches of one model, of which one guesses ahead; for a library that guesses for all requests of a batch or for none.

- All requests are in the same batch at any time: two that take turns halve the speed (measured: 0.5 to 0.6 of the tokens/s at 16 requests,
  12 of them without guesses). So they move when it is decided otherwise, which costs reading prompt and answer so far again, as far as the
  other batch's prefix cache does not hold them.
- There are guesses only while every request can be moved without changing its answer, and fits.
- The batch that guesses is never short of cache: OpenVINO's look-up fails where it would have to put a request aside
  ("get_max_new_tokens() >= generated_and_verified_len").
- A small model guesses for greedy requests only: for a sampled one OpenVINO fails ("content_length <= prompt_ids.size() + ...").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serving.engines.base import Sampling
from serving.engines.child import Batch
from serving.engines.messages import News
from serving.speculation import Speculation

if TYPE_CHECKING:  # it brings pydantic, which the process of an engine does without
    from serving.config import SpeculativeConfig

GUESSED_SHARE = 0.25
"""Of the cache, for the batch that guesses."""
CALM_STEPS = 16  # with the same requests, before they move to where there are guesses; the other way they go at once


@dataclass(slots=True)
class Request:
    """What is to be known of a request to move it."""

    ids: list[int]
    """Prompt and answer so far."""
    sampling: Sampling
    tokens_left: int
    num_blocks: int
    """Of the guessing batch's cache that it may need."""
    can_guess: bool
    has_begun: bool = False
    """Whether it has got a token where it is, so that what comes before has been read."""


class Lanes:
    """The requests of both batches, by their numbers."""

    adapters: Sequence[str] = ()

    def __init__(
        self,
        plain: Batch,
        guessing: Batch,
        config: SpeculativeConfig,
        num_blocks: int,
        block_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._plain = plain
        self._guessing = guessing
        self._num_tokens = config.num_tokens
        self._takes_sampled = config.kind != "draft"
        self._speculation = Speculation(config.max_requests, config.min_acceptance)
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._is_guessing = False
        self._num_calm = 0
        self._leaving_blocks = 0
        """Those of requests whose cache is freed in the next step."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._plain.has_work or self._guessing.has_work

    @property
    def figures(self) -> tuple[int, int, float, *tuple[int | None, ...]]:
        """The values of `base.Figures`, as of the last step."""
        plain, guessing = self._plain.figures, self._guessing.figures
        share = (1 - GUESSED_SHARE) * plain[2] + GUESSED_SHARE * guessing[2]
        return plain[0] + guessing[0], plain[1] + guessing[1], share, None, None, *self._speculation.counts

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where it is refused."""
        longest = len(prompt_ids) + sampling.max_tokens + self._num_tokens + 1
        num_blocks = -(-longest // self._block_tokens) + 1
        request = Request(list(prompt_ids), sampling, sampling.max_tokens, num_blocks, self._can_guess(sampling))
        self._num_calm = 0
        self._requests[number] = request
        wants = self._wants_guesses
        del self._requests[number]
        if self._is_guessing != wants and not (wants and any(other.has_begun for other in self._requests.values())):
            self._move(wants)
        refused = self._lane.add(number, prompt_ids, sampling)
        if refused is None:
            self._requests[number] = request
        return refused

    def cancel(self, number: int) -> None:
        """Forgets a request; the next step frees its cache."""
        if request := self._requests.pop(number, None):
            self._num_calm = 0
            self._leaving_blocks += request.num_blocks * self._is_guessing
            self._lane.cancel(number)

    def clear(self) -> None:
        """Frees what the running requests hold."""
        self._plain.clear()
        self._guessing.clear()
        self._requests.clear()

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""
        wants = self._wants_guesses
        if self._is_guessing != wants and (self._num_calm >= CALM_STEPS or not wants):
            self._move(wants)
        self._num_calm += 1
        num_requests, is_steady = len(self._requests), all(request.has_begun for request in self._requests.values())
        started_s = self._clock()
        news = [one for lane in (self._guessing, self._plain) if lane.has_work for one in lane.step()]
        elapsed_s = self._clock() - started_s
        drafts = [draft for one in news if self._is_guessing and (draft := self._draft(one))]
        num_tokens = sum(len(ids) for _, ids, *_ in news)
        self._speculation.note(num_requests, self._is_guessing if is_steady else None, drafts, num_tokens, elapsed_s)
        self._leaving_blocks = 0
        for one in news:
            self._take(one)
        return news

    @property
    def _lane(self) -> Batch:
        return self._guessing if self._is_guessing else self._plain

    @property
    def _wants_guesses(self) -> bool:
        requests = self._requests.values()
        num_blocks = self._leaving_blocks + sum(request.num_blocks for request in requests)
        can_guess = num_blocks <= self._num_blocks and all(request.can_guess for request in requests)
        return can_guess and self._speculation.wants(len(requests))

    def _can_guess(self, sampling: Sampling) -> bool:
        """Whether it goes on as it would have, told what it has written as if that were prompt: no grammar, counts or random numbers."""
        has_memory = sampling.grammar is not None or sampling.presence_penalty or sampling.frequency_penalty
        return not has_memory and (not sampling.temperature or (self._takes_sampled and sampling.seed is None))

    def _move(self, is_guessing: bool) -> None:
        """Puts all requests into the other batch; the next step frees what they held in this one."""
        old = self._lane
        self._is_guessing = is_guessing
        for number, request in self._requests.items():
            old.cancel(number)
            self._leaving_blocks += request.num_blocks * (not is_guessing)
            self._lane.add(number, request.ids, replace(request.sampling, max_tokens=request.tokens_left))
            request.has_begun = False

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
        request.ids += ids
        request.tokens_left -= len(ids)
        if finish_reason or refusal:
            del self._requests[number]
            self._num_calm = 0
