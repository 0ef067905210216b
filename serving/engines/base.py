"""What the server and the evaluation need of an engine, whichever library runs the model.

- Token ids in, token ids out; text never enters an engine.
- An engine never hangs a request: it ends with a finish reason, or raises.
- A consumer that stops iterating cancels its request.
- What an engine cannot do stands in its `Capabilities`, and nothing that it lacks is ever asked of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from infra.errors import ConfigError, TransientError

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "regex"]


class EngineError(TransientError):
    """The engine failed while this request ran, or had failed before; a restarted replica may answer it."""


class RequestRefusedError(ConfigError):
    """This engine can never answer this request, for example because its prompt is larger than the whole cache."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an answer must be; checked by `serving.grammars`, so that no engine can choke on it."""

    kind: GrammarKind
    text: str
    """The JSON schema, or the regular expression, which the whole answer matches."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one request are chosen; the defaults are greedy, so the same prompt gives the same answer."""

    max_tokens: int
    """Most tokens to make."""
    temperature: float = 0.0
    """0 picks the likeliest token."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from; absent means all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are never sampled."""
    seed: int | None = None
    """Start of the random numbers; absent means a new one each time."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides what speaks for a token that prompt or answer already hold; 1 leaves it."""
    logprobs: int | None = None
    """Absent: none. Otherwise the log-probability of each token comes with it, and of this many of the likeliest ones beside it.

    They are the model's own: temperature, filters and penalties change what is chosen and not what is told.
    """
    grammar: Grammar | None = None
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are not part of it."""
    adapter: str | None = None
    """Name of the adapter that answers; absent means the model alone."""


def read_sampling(told: Mapping[str, Any]) -> Sampling:
    """A `Sampling` out of JSON, as an engine's process gets it."""
    grammar = told["grammar"]
    return Sampling(**{**told, "grammar": Grammar(**grammar) if grammar else None, "stop_ids": tuple(told["stop_ids"])})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine with this model can do beyond plain and sampled answers."""

    engine: str
    """Its name, for messages."""
    max_top_logprobs: int
    """Most alternatives beside the chosen token; 0: the chosen one's log-probability only."""
    grammars: frozenset[GrammarKind] = frozenset()
    no_grammar_reason: str = "it has no constrained decoding"
    """Shown where a grammar is asked for and `grammars` lacks it."""
    takes_min_p: bool = True

    def refusal(self, sampling: Sampling) -> tuple[Literal["logprobs", "grammar", "min_p"], str] | None:
        """The first thing in `sampling` that the engine cannot do, and why; None where it can do all of it."""
        if (sampling.logprobs or 0) > self.max_top_logprobs:
            most = self.max_top_logprobs or "only the chosen token"
            return (
                "logprobs",
                f"{sampling.logprobs} likeliest tokens are asked for; the engine {self.engine!r} tells {most}. Ask for fewer.",
            )
        if sampling.grammar is not None and sampling.grammar.kind not in self.grammars:
            return (
                "grammar",
                f"the engine {self.engine!r} cannot constrain an answer to a {sampling.grammar.kind}: {self.no_grammar_reason}.",
            )
        if sampling.min_p and not self.takes_min_p:
            return "min_p", f"the engine {self.engine!r} has none while it guesses tokens ahead. Leave it out, or serve.speculative."
        return None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely one token was."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest token ids and their log-probabilities, best first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request got since the last chunk."""

    ids: Sequence[int]
    """New token ids, stop token left out; empty only in a last chunk."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk."""
    logprobs: Sequence[TokenLogprob] = ()
    """One for each of `ids`; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What an engine is doing now."""

    num_running: int
    num_waiting: int
    cache_usage: float
    """Share of the KV cache that holds tokens, from 0 to 1."""
    prefix_asked_tokens: int | None = None
    """Tokens of all prompts so far, each of which the prefix cache was asked for; None where the library does not tell."""
    prefix_held_tokens: int | None = None
    """Those of them that it held."""
    num_drafts: int | None = None
    """Runs of tokens guessed ahead and checked so far; None where the engine does not guess, as of the next two."""
    drafted_tokens: int | None = None
    """Tokens in them."""
    accepted_tokens: int | None = None
    """Those of them that were right."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters in memory."""


class Engine(Protocol):
    """A model that answers many requests at once."""

    async def start(self) -> None:
        """Loads the model. Raises ArtifactError when the engine cannot read it."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made; closing the generator cancels the request. Raises EngineError and RequestRefusedError."""

    async def stop(self) -> None:
        """Ends every request with EngineError and frees the model."""

    @property
    def capabilities(self) -> Capabilities:
        """What may be asked of it."""

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""

    @property
    def figures(self) -> Figures:
        """Requests and cache now."""
