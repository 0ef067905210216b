"""Sends each request to a replica, and to another where that one fails.

- Until the first byte has gone to the client a request may be sent again: nothing that is served changes anything. So a replica that dies
  costs a whole answer some time, and a stream that has begun an error event as its last.
- Where no replica is ready, requests wait for one, up to their deadline and up to as many as may queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import aiohttp
from aiohttp import AddrInfoType, web

from serving.access import REQUEST_ID_ATTRIBUTE, REQUEST_ID_HEADER
from serving.announcement import keep_asking
from serving.config import ServeConfig
from serving.errors import ApiError
from serving.front.figures import FrontFigures, RetryReason
from serving.front.pools import FirstTokenTimes, cheapest_in_time
from serving.front.relay import Asked, LostError, RefusedError, ask, read_request
from serving.front.replicas import Replica, Replicas
from serving.front.routing import Router, Wanted, read_wanted
from serving.metrics import merge
from serving.tracing import NO_SPAN, QUIET_PATHS, STATUS_ATTRIBUTE, Span, Tracer, end_request

NUM_TRIES = 4
PAUSE_S = 0.05  # a replica that has just died is struck off within this
LOOK_S = 1.0
HOLD_RETRY_S = 5
IDLE_CONNECTION_S = 30.0
MAX_ID_CHARS = 128


class Front:
    """Answers clients through the replicas; `wake` is called while requests wait and there is no replica."""

    def __init__(
        self, replicas: Replicas, token: str, limits: ServeConfig, wake: Callable[[], None], model_name: str, tracer: Tracer
    ) -> None:
        self._replicas = replicas
        self._token = token
        self._limits = limits
        self._wake = wake
        self._tracer = tracer
        self._model_name = model_name
        self._router = Router()
        self._times = FirstTokenTimes()
        self._figures = FrontFigures(model_name, replicas, lambda: self.num_held)
        self._session: aiohttp.ClientSession | None = None
        self.num_held = 0
        """Requests that wait for a replica to be ready."""
        self.num_open = 0
        """Requests that are being answered."""
        self.is_leaving = False
        """Whether `/health` says that it is going, while requests are still answered."""
        self.is_draining = False

    @property
    def app(self) -> web.Application:
        """What to listen with; a handler must be cancelled when its client leaves."""
        app = web.Application(client_max_size=self._limits.max_body_bytes)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.cleanup_ctx.append(self._open_session)
        return app

    async def _open_session(self, _app: web.Application) -> AsyncIterator[None]:
        # No limit here: each replica has its own, and says 429 beyond it.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S, socket_factory=_open_socket)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as session:
            self._session = session
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        span = self._tracer.request(request.method, request.path, request.headers)
        status, outcome = None, "failed"
        self.num_open += 1
        try:
            answer = await self._answer(request, span)
            if self.is_leaving and not answer.prepared:
                answer.force_close()
            status, outcome = answer.status, "done"
            return answer
        except asyncio.CancelledError:
            outcome = "client left"
            raise
        finally:
            self.num_open -= 1
            end_request(span, status, outcome)

    async def _answer(self, request: web.Request, span: Span) -> web.StreamResponse:
        try:
            if self.is_draining:
                raise ApiError("the server is ending and takes no new requests. Ask another one.", 503)
            asked = await read_request(request, self._limits, self._token)
            span.note({REQUEST_ID_ATTRIBUTE: asked.headers[REQUEST_ID_HEADER][:MAX_ID_CHARS]})
            if (asked.method, request.path) == ("GET", "/metrics"):
                return await self._metrics(asked, request)
            if asked.path == "/health" and self.is_leaving:
                raise ApiError("the server is going. Ask another one.", 503)
            if asked.path == "/health" and self._limits.may_sleep and not self._replicas.all:
                return web.json_response({"status": "ok", "replicas": 0})
            return await self._forward(asked, request, span)
        except ApiError as error:
            if request.path not in QUIET_PATHS:
                self._figures.note_refusal(error.status)
            closing = {"Connection": "close"} if self.is_draining else {}
            return web.json_response(error.body, status=error.status, headers={**error.headers, **closing})

    async def _forward(self, asked: Asked, request: web.Request, span: Span) -> web.StreamResponse:
        """The answer of the first replica that gives one. Raises ApiError where none does."""
        is_choice = len(self._replicas.usable) > 1
        wanted = read_wanted(asked.body, self._model_name, self._limits.adapters) if is_choice else Wanted()
        refusal: web.Response | None = None
        reason: RetryReason | None = None
        full: set[Replica] = set()
        for attempt in range(NUM_TRIES):
            candidates = [replica for replica in self._replicas.usable if replica not in full]
            if refusal is not None and full and not candidates:
                return refusal
            candidates = candidates or await self._wait_for_some(asked, span)
            replica = self._router.choose(cheapest_in_time(candidates, self._times, self._limits.target_ttft_s), wanted)
            if reason is not None:
                self._figures.note_retry(reason)
            try:
                return await self._ask(replica, asked, request, span, attempt)
            except RefusedError as refused:
                refusal = refused.answer
                if refusal.status == 503:
                    replica.has_failed = True  # Ray Serve will put another in its place
                    reason = "failed"
                else:
                    full.add(replica)
                    reason = "full"
            except LostError:
                reason = "lost"
                await asyncio.sleep(PAUSE_S * (attempt + 1))
        if refusal is not None:
            return refusal
        raise ApiError("the replicas that were asked ended before they answered. Ask again.", 503)

    async def _ask(
        self, replica: Replica, asked: Asked, request: web.Request, span: Span = NO_SPAN, num_before: int = 0
    ) -> web.StreamResponse:
        """What one replica answers; `num_before` counts those that were asked before it. Raises LostError and RefusedError."""
        assert self._session is not None
        part = span.child("ask a replica", {"slipway.replica": replica.name, "http.request.resend_count": num_before}, is_call=True)
        replica.num_running += 1
        try:
            onward = replace(asked, headers=part.onward(asked.headers))
            answer = await ask(
                self._session, replica.url, onward, request, part, lambda first_s: self._times.note(replica.standing.pool, first_s)
            )
            part.note({STATUS_ATTRIBUTE: answer.status})
            return answer
        except RefusedError as refused:
            part.note({STATUS_ATTRIBUTE: refused.answer.status})
            part.fail("failed" if refused.answer.status == 503 else "full")
            raise
        except LostError:
            part.fail("lost")
            raise
        finally:
            replica.num_running -= 1
            part.end()

    async def _wait_for_some(self, asked: Asked, span: Span) -> list[Replica]:
        """The replicas, once there are some. Raises ApiError 429 where too many wait already, 503 past the deadline."""
        if asked.path == "/health":
            raise ApiError("no replica is ready.", 503)
        if self.num_held >= max(self._limits.max_queued_requests, 1):
            raise ApiError("no replica is ready, and as many requests as may wait do. Ask again.", 429, retry_after_s=HOLD_RETRY_S)
        begun_s = time.perf_counter()
        self.num_held += 1
        try:
            while not (usable := self._replicas.usable):
                left_s = asked.deadline_s - time.monotonic()
                if left_s <= 0 or self.is_draining:
                    raise ApiError("no replica became ready in time. Ask again.", 503)
                self._wake()
                await self._replicas.wait_for_change(min(left_s, LOOK_S))
            return usable
        finally:
            self.num_held -= 1
            span.past("wait for a replica", begun_s, time.perf_counter())

    async def _metrics(self, asked: Asked, request: web.Request) -> web.Response:
        """The figures of all replicas that answer, and the front's own, as one text; where they refuse (no key), what one of them said.

        With `?of=counted` only of those replicas that no other front counts: every front is then scraped, and each replica told of once.
        """
        if "/metrics" not in self._limits.open_paths and not self._replicas.all:
            raise ApiError("no replica is ready, and only those can check the key that figures need here.", 503)
        answers: list[web.Response] = []
        told = [replica for replica in self._replicas.all if replica.standing.is_counted_here or request.query.get("of") != "counted"]
        for replica in told:
            with contextlib.suppress(LostError):
                try:
                    answer = await self._ask(replica, asked, request)
                except RefusedError as refused:
                    answer = refused.answer
                assert isinstance(answer, web.Response)
                answers.append(answer)
        good = [answer for answer in answers if answer.status == 200]
        if answers and not good:
            return answers[0]
        text = merge([self._figures.text, *(str(answer.text) for answer in good)])
        return web.Response(text=text, headers=good[0].headers if good else None)


def _open_socket(address: AddrInfoType) -> socket.socket:
    """A socket for a connection to a replica."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family=family, type=kind, proto=protocol)
    keep_asking(opened)
    return opened
