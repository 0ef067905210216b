"""An engine without a model: says what it was told to say. For tests of everything in front of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from serving.engines.base import Capabilities, Chunk, EngineError, Figures, GrammarKind, Sampling, TokenLogprob

GRAMMARS: frozenset[GrammarKind] = frozenset({"json_schema", "regex"})
ALL = Capabilities("scripted", max_top_logprobs=20, grammars=GRAMMARS)
LOGPROB = -0.5


class ScriptedEngine:
    """Answers every prompt with `answer_ids`, `chunk_tokens` at a time, up to the request's own limit.

    `fails_after` chunks it breaks for good; with `is_endless` it repeats its answer until cancelled.
    """

    def __init__(
        self,
        answer_ids: Sequence[int],
        chunk_tokens: int = 1,
        fails_after: int | None = None,
        is_endless: bool = False,
        capabilities: Capabilities = ALL,
        prefix_counts: tuple[int | None, int | None] = (None, None),
        draft_counts: tuple[int, int, int] | None = None,
    ) -> None:
        self._answer_ids = tuple(answer_ids)
        self._chunk_tokens = chunk_tokens
        self._fails_after = fails_after
        self._is_endless = is_endless
        self._capabilities = capabilities
        self._prefix_counts = prefix_counts
        self._draft_counts = draft_counts or ()
        self._failure: str | None = None
        self._num_running = 0
        self.seen: list[tuple[tuple[int, ...], Sampling]] = []
        """Every request, in order."""
        self.num_cancelled = 0

    async def start(self) -> None:
        """Does nothing."""

    async def stop(self) -> None:
        """Makes every later request fail."""
        self._failure = "the engine was stopped"

    @property
    def capabilities(self) -> Capabilities:
        """As told; all of it by default, grammars being asked for and never kept."""
        return self._capabilities

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""
        return self._failure

    @property
    def figures(self) -> Figures:
        """Requests now, prefix cache and guesses as told."""
        return Figures(self._num_running, 0, 0.0, *self._prefix_counts, *self._draft_counts)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """The scripted answer. Raises EngineError as told."""
        self.seen.append((tuple(prompt_ids), sampling))
        self._num_running += 1
        is_done = False
        try:
            async for chunk in self._chunks(sampling.max_tokens, sampling.logprobs):
                is_done = chunk.finish_reason is not None
                yield chunk
        except EngineError:
            is_done = True
            raise
        finally:
            self._num_running -= 1
            self.num_cancelled += not is_done

    async def _chunks(self, max_tokens: int, num_top: int | None) -> AsyncGenerator[Chunk, None]:
        ids = self._answer_ids if self._is_endless else self._answer_ids[:max_tokens]
        num_chunks = 0
        while True:
            for start in range(0, len(ids), self._chunk_tokens):
                await asyncio.sleep(0)
                if num_chunks == self._fails_after:
                    self._failure = "the engine failed: as scripted"
                if self._failure is not None:
                    raise EngineError(self._failure)
                num_chunks += 1
                part = ids[start : start + self._chunk_tokens]
                told = [TokenLogprob(LOGPROB, tuple((token, LOGPROB) for _ in range(num_top or 0))) for token in part]
                yield Chunk(part, None, () if num_top is None else told)
            if not self._is_endless:
                yield Chunk((), "length" if len(self._answer_ids) > max_tokens else "stop")
                return
