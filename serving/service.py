"""The policy of one replica, free of HTTP: what is admitted, with which limits, and how tokens become text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from infra.chat import ChatCodec
from infra.errors import ConfigError
from serving.admission import Claim, Gate, Ticket
from serving.config import ServeConfig
from serving.engines.base import Chunk, Engine, EngineError, FinishReason, RequestRefusedError, Sampling
from serving.errors import ApiError
from serving.metrics import Metrics
from serving.openai_schema import ChatRequest, CompletionRequest, SamplingRequest
from serving.stop_strings import StopStrings

LONG_PROMPT_CHARS = 8192  # encoding this much takes about 3 ms, in which the event loop could serve others


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the policy knows of the model."""

    name: str
    fingerprint: str
    """Start of the artifact's content digest, shown to clients."""
    context_tokens: int
    vocabulary_tokens: int
    stop_ids: tuple[int, ...]
    created_s: int


@dataclass(frozen=True, slots=True)
class Order:
    """A request that was found good: what to generate, and where to end."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_strings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become readable since the last piece."""

    text: str
    num_tokens: int
    """Tokens made since the last piece."""
    finish_reason: FinishReason | None = None


@dataclass
class Service:
    """One model ready to answer."""

    model: ServedModel
    engine: Engine
    codec: ChatCodec
    limits: ServeConfig
    metrics: Metrics
    gate: Gate

    async def chat_order(self, request: ChatRequest) -> Order:
        """The order for a chat. Raises ApiError when it cannot be answered."""
        self._check_model(request)
        messages = [message.for_template for message in request.messages]

        def encode() -> list[int]:
            return self.codec.encode(messages, request.template_tools, add_generation_prompt=True)

        num_chars = sum(len(message["content"]) for message in messages)
        try:
            prompt_ids = await _encode(encode, num_chars)
        except (ConfigError, RecursionError) as error:
            raise ApiError(str(error), param="messages") from error
        return self._order(request, prompt_ids, "messages")

    async def completion_order(self, request: CompletionRequest) -> Order:
        """The order for a plain prompt. Raises ApiError when it cannot be answered."""
        self._check_model(request)
        prompt = request.text_or_ids
        if isinstance(prompt, str):
            text = prompt
            prompt = await _encode(lambda: self.codec.encode_text(text), len(text))
        return self._order(request, prompt, "prompt")

    async def answer(self, order: Order, claim: Claim) -> AsyncGenerator[Piece, None]:
        """The answer's text as it becomes readable; closing it cancels the request. Raises ApiError, 429 where the queue is full."""
        arrived_s = time.perf_counter()
        decoder, stops = self.codec.stream_decoder(), StopStrings(order.stop_strings)
        reason = None
        try:
            async with self.gate.place(claim) as ticket, aclosing(self._timed_chunks(order, ticket, arrived_s)) as chunks:
                reason = "abort"
                async for chunk in chunks:
                    text = stops.feed("".join(map(decoder.feed, chunk.ids)))
                    if stops.is_found:
                        reason = "stop"
                        yield Piece(text, len(chunk.ids), "stop")
                        return
                    if chunk.finish_reason is not None:
                        reason = chunk.finish_reason
                        text += stops.flush()
                    yield Piece(text, len(chunk.ids), chunk.finish_reason)
        except RequestRefusedError as error:
            reason = "error"
            raise ApiError(error.message) from error
        except EngineError as error:
            reason = "error"
            raise ApiError(error.message, 503) from error
        finally:
            if reason is not None:  # it had a place
                self.metrics.finished.labels(*self.metrics.labels, reason).inc()
                self.metrics.request_duration.observe(time.perf_counter() - arrived_s)

    async def _timed_chunks(self, order: Order, ticket: Ticket, arrived_s: float) -> AsyncGenerator[Chunk, None]:
        """The engine's chunks, their times and counts noted."""
        metrics = self.metrics
        started_s = last_s = time.perf_counter()
        first_s: float | None = None
        metrics.prompt_tokens.inc(len(order.prompt_ids))
        metrics.queue_time.observe(ticket.waited_s)
        try:
            async with aclosing(self.engine.generate(order.prompt_ids, order.sampling)) as chunks:
                async for chunk in chunks:
                    now_s = time.perf_counter()
                    if chunk.ids:
                        metrics.generated_tokens.inc(len(chunk.ids))
                        self.gate.charge(ticket, len(chunk.ids))
                        if first_s is None:
                            first_s = now_s
                            metrics.first_token.observe(now_s - arrived_s)
                            metrics.prefill_time.observe(now_s - started_s)
                        else:
                            metrics.between_tokens.observe((now_s - last_s) / len(chunk.ids))
                        last_s = now_s
                    yield chunk
        finally:
            if first_s is not None:
                metrics.decode_time.observe(last_s - first_s)

    def _check_model(self, request: SamplingRequest) -> None:
        if request.model != self.model.name:
            message = f"the model {request.model!r} does not exist here; {self.model.name!r} is served."
            raise ApiError(message, 404, param="model", code="model_not_found")

    def _order(self, request: SamplingRequest, prompt_ids: Sequence[int], param: str) -> Order:
        if not prompt_ids:
            raise ApiError(f"{param}: an empty prompt; at least one token is needed.", param=param)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.model.vocabulary_tokens:
            raise ApiError(f"{param}: a token id outside 0 to {self.model.vocabulary_tokens - 1}.", param=param, code="invalid_token_id")
        return Order(prompt_ids, self._sampling(request, len(prompt_ids)), request.stop_strings)

    def _sampling(self, request: SamplingRequest, num_prompt: int) -> Sampling:
        return Sampling(
            max_tokens=self._max_tokens(request.wanted_tokens, num_prompt),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            stop_ids=() if request.ignore_eos else self.model.stop_ids,
        )

    def _max_tokens(self, wanted: int | None, num_prompt: int) -> int:
        """New tokens to make at most. Raises ApiError where the context or the server's own limit has no room for what is wanted."""
        room = self.model.context_tokens - num_prompt
        if room < (wanted or 1):
            needed = f"{num_prompt} prompt tokens and {wanted or 'at least 1'} new ones"
            raise ApiError(
                f"{needed} are needed, but the context holds {self.model.context_tokens}. Shorten the prompt or ask for fewer tokens.",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > self.limits.max_tokens_limit:
            message = f"{wanted} new tokens are asked for; at most {self.limits.max_tokens_limit} are made."
            raise ApiError(message, param="max_tokens", code="invalid_value")
        return min(room, self.limits.default_max_tokens, self.limits.max_tokens_limit) if wanted is None else wanted


async def _encode(encode: Callable[[], list[int]], num_chars: int) -> list[int]:
    """Runs `encode`, in a thread where the text is long."""
    return await asyncio.to_thread(encode) if num_chars > LONG_PROMPT_CHARS else encode()
