"""Tokens guessed ahead in vLLM: how it is told to, whether it does in the next step, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from serving.config import SpeculativeConfig
from serving.speculation import Speculation

ALL = 1 << 30  # more requests than there can be


def guesses_config(config: SpeculativeConfig) -> dict[str, Any]:
    """vLLM's own settings. Source: vllm/config/speculative.py of 0.32."""
    settings: dict[str, Any] = {
        "num_speculative_tokens": config.num_tokens,
        # A table by the number of requests, read at every step: without one the number of tokens could not change.
        "num_speculative_tokens_per_batch_size": [(1, ALL, config.num_tokens)],
    }
    if config.draft_model_dir is not None:
        return settings | {"method": "draft_model", "model": str(config.draft_model_dir)}
    return settings | {"method": "ngram", "prompt_lookup_max": config.max_ngram_size, "prompt_lookup_min": 1}


class VllmGuesses:
    """Sets vLLM's table before each step, and hears from its scheduler what was accepted; its own statistics cost more than these."""

    def __init__(self, scheduler: Any, config: SpeculativeConfig) -> None:
        self._table: list[int] = scheduler.dynamic_sd_lookup
        self._num_tokens = config.num_tokens
        self._speculation = Speculation(config.max_requests, config.min_acceptance)
        self._drafts: list[tuple[int, int]] = []
        self._is_on = True
        self._started_s = 0.0
        scheduler.make_spec_decoding_stats = self._hear

    @property
    def counts(self) -> tuple[int, int, int]:
        """What `base.Figures` tells of it."""
        return self._speculation.counts

    def begin(self, num_requests: int, can_guess: bool = True) -> None:
        """Before a step: whether it guesses for the next one, which it does not where a request would be answered otherwise for it."""
        self._is_on = can_guess and self._speculation.wants(num_requests)
        self._table[:] = [self._num_tokens * self._is_on] * len(self._table)
        self._started_s = time.perf_counter()

    def end(self, num_requests: int, is_steady: bool, num_tokens: int) -> None:
        """After it; `is_steady` where it read no prompt."""
        elapsed_s = time.perf_counter() - self._started_s
        self._speculation.note(num_requests, self._is_on if is_steady else None, self._drafts, num_tokens, elapsed_s)
        self._drafts = []

    def _hear(
        self, _: Any, *, num_draft_tokens: int, num_accepted_tokens: int, num_invalid_spec_tokens: Mapping[str, int] | None, request_id: str
    ) -> None:
        """In place of the scheduler's own: is called for each request whose guesses were checked; a grammar strikes some out before."""
        num_struck = (num_invalid_spec_tokens or {}).get(request_id, 0)
        self._drafts.append((num_draft_tokens - num_struck, num_accepted_tokens))
