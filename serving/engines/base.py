"""What the server and the evaluation need of an engine, whichever library runs the model.

- Token ids in, token ids out; text never enters an engine.
- An engine never hangs a request: it ends with a finish reason, or raises.
- A consumer that stops iterating cancels its request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from infra.config import Config
from infra.errors import ConfigError, TransientError

FinishReason = Literal["stop", "length"]


class EngineError(TransientError):
    """The engine failed while this request ran, or had failed before; a restarted replica may answer it."""


class RequestRefusedError(ConfigError):
    """This engine can never answer this request, for example because its prompt is larger than the whole cache."""


class Sampling(Config):
    """How the tokens of one request are chosen; the defaults are greedy, so the same prompt gives the same answer."""

    max_tokens: int
    """Most tokens to make."""
    temperature: float = 0.0
    """0 picks the likeliest token."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from; absent means all."""
    seed: int | None = None
    """Start of the random numbers; absent means a new one each time."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are not part of it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request got since the last chunk."""

    ids: Sequence[int]
    """New token ids, stop token left out; empty only in a last chunk."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What an engine is doing now."""

    num_running: int
    num_waiting: int
    cache_usage: float
    """Share of the KV cache that holds tokens, from 0 to 1."""


class Engine(Protocol):
    """A model that answers many requests at once."""

    async def start(self) -> None:
        """Loads the model. Raises ArtifactError when the engine cannot read it."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made; closing the generator cancels the request. Raises EngineError and RequestRefusedError."""

    async def stop(self) -> None:
        """Ends every request with EngineError and frees the model."""

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""

    @property
    def figures(self) -> Figures:
        """Requests and cache now."""
