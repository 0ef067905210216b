"""One choice of an answer: token ids in, text, calls and log-probabilities out, as far as they are certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infra.chat import ChatCodec
from serving.engines.base import Chunk, FinishReason, Sampling, TokenLogprob
from serving.stop_strings import StopStrings
from serving.tool_calls import FoundCall, ToolCalls

ChoiceReason = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class Order:
    """A request that was found good: what to generate, and how to read it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    num_choices: int = 1
    tool_names: frozenset[str] = frozenset()
    """Tools whose calls are looked for in the text."""
    has_single_call: bool = False


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """One token as log-probabilities show it."""

    text: str
    bytes: list[int]
    logprob: float
    top: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What of one choice has become readable since its last piece."""

    text: str
    num_tokens: int
    """Tokens made since the last piece."""
    finish_reason: ChoiceReason | None = None
    index: int = 0
    """Number of the choice."""
    calls: Sequence[FoundCall] = ()
    logprobs: Sequence[LikelyToken] = ()
    """One for each token made, where asked for."""

    @property
    def is_shown(self) -> bool:
        """Whether a client sees anything of it."""
        return bool(self.text or self.finish_reason or self.calls or self.logprobs)


class Choice:
    """Reads the tokens of one choice of `order`."""

    def __init__(self, codec: ChatCodec, order: Order, index: int) -> None:
        self._codec = codec
        self._decoder = codec.stream_decoder()
        self._stops = StopStrings(order.stop_strings)
        self._tools = ToolCalls(order.tool_names, order.has_single_call)
        self._index = index

    def read(self, chunk: Chunk) -> Piece:
        """What `chunk` makes certain; the piece with a finish reason is the last, also where the chunk has none."""
        text = self._stops.feed("".join(map(self._decoder.feed, chunk.ids)))
        reason: ChoiceReason | None = "stop" if self._stops.is_found else chunk.finish_reason
        if reason is not None:
            text += self._stops.flush()
        text, calls = self._tools.feed(text)
        if reason is not None:
            text += self._tools.flush()
            if reason == "stop" and self._tools.num_found:
                reason = "tool_calls"
        logprobs = [self._likely(token_id, told) for token_id, told in zip(chunk.ids, chunk.logprobs, strict=False)]
        return Piece(text, len(chunk.ids), reason, self._index, calls, logprobs)

    def _likely(self, token_id: int, told: TokenLogprob) -> LikelyToken:
        top = tuple(LikelyToken(self._codec.token_text(other), self._codec.token_bytes(other), value) for other, value in told.top)
        return LikelyToken(self._codec.token_text(token_id), self._codec.token_bytes(token_id), told.logprob, top)
