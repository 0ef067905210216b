"""The OpenAI API over HTTP: routes, bodies, errors and disconnects; everything decided lies in `serving.service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import gen_ai
from serving.access import Access, Caller
from serving.admission import Claim
from serving.choice import ChoiceReason, Order, Piece
from serving.errors import ApiError
from serving.metrics import Metrics
from serving.openai_format import AnswerFormat, Endpoint, Usage, error_event
from serving.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingRequest, TokenizeRequest, parse_request
from serving.openapi import document
from serving.service import ServedModel, Service
from serving.tracing import Span, Tracer

CLIENT_GONE_STATUS = 499  # nginx's number for a client that hung up; nobody receives it, but the metrics count it
EVENT_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def build_api(service: Service, tracer: Tracer | None = None) -> FastAPI:
    """The routes in front of `service`; no traces without a tracer."""
    api = FastAPI(title="Slipway", docs_url=None, redoc_url=None, openapi_url=None)
    handlers = _Handlers(service)
    routes = (
        ("POST", "/v1/chat/completions", handlers.chat),
        ("POST", "/v1/completions", handlers.completion),
        ("POST", "/v1/embeddings", handlers.embeddings),
        ("POST", "/tokenize", handlers.tokenize),
        ("POST", "/detokenize", handlers.detokenize),
        ("GET", "/v1/models", handlers.models),
        ("GET", "/v1/models/{name:path}", handlers.model),
        ("GET", "/health", handlers.health),
        ("GET", "/metrics", handlers.metrics),
    )
    described = document([(method, path) for method, path, _ in routes], service.model.all_names)

    async def openapi() -> Response:
        return JSONResponse(described)

    api.add_api_route("/openapi.json", openapi, methods=["GET"], response_model=None)
    for method, path, handler in routes:
        api.add_api_route(path, handler, methods=[method], response_model=None)
    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ClientDisconnect, _on_disconnect)
    api.add_exception_handler(Exception, _on_crash)
    api.add_middleware(Access, limits=service.limits, tracer=tracer or Tracer())
    api.add_middleware(_CountRequests, metrics=service.metrics, paths=frozenset(path for _, path, _ in routes))
    return api


class _Handlers:
    """One method a route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        asked = parse_request(ChatRequest, await _read_body(request, self._service.limits.max_body_bytes))
        caller = _require_caller(request, asked)
        return self._answer("chat", asked, await self._service.chat_order(asked), caller, request)

    async def completion(self, request: Request) -> Response:
        asked = parse_request(CompletionRequest, await _read_body(request, self._service.limits.max_body_bytes))
        caller = _require_caller(request, asked)
        return self._answer("completion", asked, await self._service.completion_order(asked), caller, request)

    async def embeddings(self, request: Request) -> Response:
        await _read_body(request, self._service.limits.max_body_bytes)
        message = f"the model {self._service.model.name!r} writes text; it gives no embeddings. Ask a server of an embedding model."
        raise ApiError(message, param="model", code="unsupported_model")

    async def tokenize(self, request: Request) -> Response:
        order = parse_request(TokenizeRequest, await _read_body(request, self._service.limits.max_body_bytes))
        ids = await self._service.tokenize(order)
        names = [self._service.codec.tokenizer.id_to_token(token) for token in ids] if order.return_token_strs else None
        model = self._service.model
        return JSONResponse({"count": len(ids), "max_model_len": model.context_tokens, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        order = parse_request(DetokenizeRequest, await _read_body(request, self._service.limits.max_body_bytes))
        return JSONResponse({"prompt": self._service.detokenize(order)})

    async def models(self) -> Response:
        model = self._service.model
        return JSONResponse({"object": "list", "data": [_model_body(each) for each in (model, *model.adapters.values())]})

    async def model(self, name: str) -> Response:
        return JSONResponse(_model_body(self._service.model.named(name)))

    async def health(self) -> Response:
        failure = self._service.engine.failure
        if failure is not None:
            raise ApiError(failure, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        return Response(self._service.metrics.text, media_type=CONTENT_TYPE_LATEST)

    def _answer(self, endpoint: Endpoint, request: SamplingRequest, order: Order, caller: Caller, sent: Request) -> Response:
        model = self._service.model.named(request.model)
        sent.state.model = model.name  # for the log
        claim = Claim(caller.owner, caller.weight, request.priority or 0, len(order.prompt_ids))
        answer = AnswerFormat(endpoint, model, request.includes_usage)
        write = partial(_write_events, tells_usage=request.tells_usage) if request.stream else _write_body
        pieces, span = self._service.answer(order, claim, caller.span), caller.span
        if span.is_recorded:
            span.rename(f"{gen_ai.OPERATIONS[endpoint]} {request.model}")
            span.note(gen_ai.asked(endpoint, request.model, order, bool(request.stream)))
            pieces = _noted(pieces, span)
        return _WhileConnected(lambda send: write(pieces, answer, len(order.prompt_ids), send))


class _WhileConnected(Response):
    """Runs `write` until it is done or the client is gone, whichever comes first; a client that leaves cancels the generation."""

    def __init__(self, write: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._write(send))
        watch = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


async def _noted(pieces: AsyncGenerator[Piece, None], span: Span) -> AsyncGenerator[Piece, None]:
    """The pieces; in the end the span is told what they were."""
    num_made, reasons = 0, dict[int, ChoiceReason]()
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                num_made += piece.num_tokens
                if piece.finish_reason is not None:
                    reasons[piece.index] = piece.finish_reason
                yield piece
        finally:
            span.note(gen_ai.answered(num_made, reasons))


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _write_body(pieces: AsyncGenerator[Piece, None], answer: AnswerFormat, num_prompt: int, send: Send) -> None:
    """Sends the answer as one JSON body. Raises ApiError before anything is sent."""
    shown: list[Piece] = []
    num_generated = 0
    async with aclosing(pieces):
        async for piece in pieces:
            shown.append(piece)
            num_generated += piece.num_tokens
    body = JSONResponse(answer.body(shown, Usage(num_prompt, num_generated)))
    await send({"type": "http.response.start", "status": 200, "headers": body.raw_headers})
    await send({"type": "http.response.body", "body": body.body})


async def _write_events(pieces: AsyncGenerator[Piece, None], answer: AnswerFormat, num_prompt: int, send: Send, tells_usage: bool) -> None:
    """Sends the answer as server-sent events, with the token counts so far in each where `tells_usage`.

    Raises ApiError before the first; a later error becomes an event of its own.
    """
    num_generated, has_begun = 0, False
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                if not has_begun:
                    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
                    has_begun = True
                num_generated += piece.num_tokens
                if piece.is_shown:
                    usage = Usage(num_prompt, num_generated) if tells_usage else None
                    await send({"type": "http.response.body", "body": answer.event(piece, usage), "more_body": True})
            ending = answer.last_events(Usage(num_prompt, num_generated))
        except ApiError as error:
            if not has_begun:
                raise
            ending = error_event(error.body)
    await send({"type": "http.response.body", "body": ending})


def _require_caller(request: Request, asked: SamplingRequest) -> Caller:
    """Who sent the request, which is noted for the log. Raises ApiError 403 where its priority is not theirs to ask for."""
    caller: Caller = request.state.caller
    caller.require_priority(asked.priority or 0)
    request.state.asked = asked
    return caller


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The request's body. Raises ApiError 415 or 413, the latter before more than `max_bytes` are held."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(f"the body is sent as {media_type!r}; application/json is needed.", 415)
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    too_large = ApiError(f"the body is larger than {max_bytes} bytes, the most that is read. Send less.", 413)
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _model_body(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "slipway",
        "max_model_len": model.context_tokens,
        "system_fingerprint": model.fingerprint,
        "parent": model.parent,
    }


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. GET /v1/models shows what is served."
    return JSONResponse(ApiError(message, error.status_code).body, error.status_code, headers=error.headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


async def _on_crash(_request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(f"the server failed on this request: {type(error).__name__}", 500).body, 500)


class _CountRequests:
    """Counts every request by path and status; unknown paths share one label, so that a scanner cannot fill the registry."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE_STATUS

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(*self._metrics.labels, path, str(status)).inc()
