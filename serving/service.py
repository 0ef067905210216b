"""The policy of one replica, free of HTTP: what is admitted, with which limits, and how tokens become text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from infra.chat import ChatCodec
from infra.errors import ConfigError
from serving.adapter_figures import Use
from serving.adapters import adapter_named
from serving.admission import Claim, Gate, Ticket
from serving.choice import Choice, Order, Piece
from serving.config import ServeConfig
from serving.engines.base import Chunk, Engine, EngineError, RequestRefusedError, Sampling
from serving.errors import ApiError
from serving.merge import merged
from serving.metrics import Metrics
from serving.openai_messages import Message
from serving.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingRequest, TokenizeRequest
from serving.tracing import NO_SPAN, Span

LONG_PROMPT_CHARS = 8192  # encoding this much takes about 3 ms, in which the event loop could serve others


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the policy knows of the model, or of an adapter beside it."""

    name: str
    fingerprint: str
    """Start of the artifact's content digest, shown to clients."""
    context_tokens: int
    vocabulary_tokens: int
    stop_ids: tuple[int, ...]
    created_s: int
    parent: str | None = None
    """Name of the model that an adapter belongs to; None for that model itself."""
    adapters: Mapping[str, ServedModel] = field(default_factory=dict)
    """Those beside the model, by name."""

    @property
    def all_names(self) -> list[str]:
        """Every name that clients may ask for."""
        return [self.name, *self.adapters, *(f"{self.name}:{name}" for name in self.adapters)]

    def named(self, name: str) -> ServedModel:
        """The model or the adapter that a client means. Raises ApiError 404."""
        if name == self.name:
            return self
        if (adapter := adapter_named(name, self.name, self.adapters)) is not None:
            return self.adapters[adapter]
        served = f"{self.name!r} is served" + (f", with the adapters {', '.join(self.adapters)}" if self.adapters else "")
        raise ApiError(f"the model {name!r} does not exist here; {served}.", 404, param="model", code="model_not_found")


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
        model = self.model.named(request.model)
        prompt_ids = await self._encode_chat(request.messages, request.template_tools, add_generation_prompt=True)
        return self._order(request, model, prompt_ids, "messages")

    async def completion_order(self, request: CompletionRequest) -> Order:
        """The order for a plain prompt. Raises ApiError when it cannot be answered."""
        model = self.model.named(request.model)
        prompt = request.text_or_ids
        if isinstance(prompt, str):
            text = prompt
            prompt = await _encode(lambda: self.codec.encode_text(text), len(text))
        return self._order(request, model, prompt, "prompt")

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Token ids of a prompt or of a chat, as an answer would begin with. Raises ApiError where they cannot be encoded."""
        self.model.named(request.model or self.model.name)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError("prompt or messages is needed, and not both. Send one of them.", param="prompt")
        if request.messages is None:
            text = request.prompt or ""
            return await _encode(lambda: self.codec.encode_text(text), len(text))
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
        return await self._encode_chat(request.messages, tools, request.add_generation_prompt)

    def detokenize(self, request: DetokenizeRequest) -> str:
        """Text of token ids, special tokens shown. Raises ApiError on ids that the model lacks."""
        self.model.named(request.model or self.model.name)
        self._check_ids(request.tokens, "tokens")
        return str(self.codec.tokenizer.decode(request.tokens, skip_special_tokens=False))

    async def answer(self, order: Order, claim: Claim, span: Span = NO_SPAN) -> AsyncGenerator[Piece, None]:
        """The answer's text as it becomes readable; closing it cancels the request. Raises ApiError, 429 where the queue is full.

        Several choices share one place: their tokens are charged to the same key. Waiting, prefill and decode become parts of `span`.
        """
        arrived_s, use = time.perf_counter(), Use(self.metrics.adapters, order.sampling.adapter)
        reason, num_unfinished = None, order.num_choices
        try:
            async with self.gate.place(claim) as ticket:
                reason = "abort"
                use.begin(len(order.prompt_ids))
                self.metrics.prompt_tokens.inc(len(order.prompt_ids))
                self.metrics.queue_time.observe(ticket.waited_s)
                span.past("queue", arrived_s, arrived_s + ticket.waited_s)
                choices = [self._choice(order, index, ticket, arrived_s, span) for index in range(order.num_choices)]
                async with aclosing(merged(choices) if len(choices) > 1 else choices[0]) as pieces:
                    async for piece in pieces:
                        num_unfinished -= piece.finish_reason is not None
                        if not num_unfinished:
                            reason = "length" if piece.finish_reason == "length" else "stop"
                        yield piece
        except RequestRefusedError as error:
            reason = "error"
            raise ApiError(error.message) from error
        except EngineError as error:
            reason = "error"
            span.fail("engine_failed")
            raise ApiError(error.message, 503) from error
        finally:
            use.end()
            if reason is not None:  # it had a place
                self.metrics.finished.labels(*self.metrics.labels, reason).inc()
                self.metrics.request_duration.observe(time.perf_counter() - arrived_s)
            else:
                span.past("queue", arrived_s, time.perf_counter())

    async def _choice(self, order: Order, index: int, ticket: Ticket, arrived_s: float, span: Span) -> AsyncGenerator[Piece, None]:
        """One of the choices; they share the prompt in the engine's prefix cache, and differ by their seeds."""
        choice, sampling = Choice(self.codec, order, index), order.sampling
        if index and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        async with aclosing(self._timed_chunks(order.prompt_ids, sampling, ticket, arrived_s, span)) as chunks:
            async for chunk in chunks:
                piece = choice.read(chunk)
                yield piece
                if piece.finish_reason is not None:
                    return

    async def _timed_chunks(
        self, prompt_ids: Sequence[int], sampling: Sampling, ticket: Ticket, arrived_s: float, span: Span
    ) -> AsyncGenerator[Chunk, None]:
        """The engine's chunks, their times and counts noted."""
        metrics = self.metrics
        started_s = last_s = time.perf_counter()
        first_s: float | None = None
        try:
            async with aclosing(self.engine.generate(prompt_ids, sampling)) as chunks:
                async for chunk in chunks:
                    now_s = time.perf_counter()
                    if chunk.ids:
                        metrics.generated_tokens.inc(len(chunk.ids))
                        metrics.adapters.made(sampling.adapter, len(chunk.ids))
                        self.gate.charge(ticket, len(chunk.ids))
                        if first_s is None:
                            first_s = now_s
                            metrics.first_token.observe(now_s - arrived_s)
                            metrics.recent_first_tokens.note(now_s - arrived_s)
                            metrics.prefill_time.observe(now_s - started_s)
                        else:
                            metrics.between_tokens.observe((now_s - last_s) / len(chunk.ids))
                        last_s = now_s
                    yield chunk
        finally:
            span.past("prefill", started_s, first_s or time.perf_counter())
            if first_s is not None:
                metrics.decode_time.observe(last_s - first_s)
                span.past("decode", first_s, last_s)

    async def _encode_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> list[int]:
        shown = [message.for_template for message in messages]

        def encode() -> list[int]:
            return self.codec.encode(shown, tools, add_generation_prompt)

        try:
            return await _encode(encode, sum(len(message["content"]) for message in shown))
        except (ConfigError, RecursionError) as error:
            raise ApiError(str(error), param="messages") from error

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.model.vocabulary_tokens:
            raise ApiError(f"{param}: a token id outside 0 to {self.model.vocabulary_tokens - 1}.", param=param, code="invalid_token_id")

    def _order(self, request: SamplingRequest, model: ServedModel, prompt_ids: Sequence[int], param: str) -> Order:
        if not prompt_ids:
            raise ApiError(f"{param}: an empty prompt; at least one token is needed.", param=param)
        self._check_ids(prompt_ids, param)
        tool_names, is_single = frozenset[str](), False
        if isinstance(request, ChatRequest):
            tool_names, is_single = request.tool_names, request.parallel_tool_calls is False
        sampling = self._sampling(request, model.name if model.parent else None, len(prompt_ids))
        return Order(prompt_ids, sampling, request.stop_strings, request.n or 1, tool_names, is_single)

    def _sampling(self, request: SamplingRequest, adapter: str | None, num_prompt: int) -> Sampling:
        grammar, grammar_param = request.grammar or (None, None)
        sampling = Sampling(
            max_tokens=self._max_tokens(request.wanted_tokens, num_prompt),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k,
            min_p=request.min_p or 0.0,
            seed=request.seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            logprobs=request.num_logprobs,
            grammar=grammar,
            stop_ids=() if request.ignore_eos else self.model.stop_ids,
            adapter=adapter,
        )
        if refusal := self.engine.capabilities.refusal(sampling):
            lacking, reason = refusal
            params = {"grammar": grammar_param, "logprobs": "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"}
            param = params.get(lacking, lacking)
            raise ApiError(f"{param}: {reason}", param=param, code="unsupported_parameter")
        return sampling

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
