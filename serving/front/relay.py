"""One request to one replica, and its answer back to the client, free of any choice between replicas."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from serving.access import REQUEST_ID_HEADER, TIMEOUT_HEADER
from serving.announcement import TOKEN_HEADER
from serving.config import ServeConfig
from serving.errors import ApiError
from serving.openai_format import error_event
from serving.tracing import Span

# What concerns one connection only (RFC 9110, section 7.6.1), and what the next one says anew.
HOP_HEADERS = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
HOP_HEADERS |= {"expect", "host", "content-length"}
GRACE_S = 5.0  # a replica itself ends what is past its deadline; the front does so only where the replica hangs
CONNECT_S = 3.0  # a machine that is gone does not even refuse
EVENT_STREAM = "text/event-stream"
EVENT_END = b"\n\n"
REFUSALS = (429, 503)


class LostError(Exception):
    """The replica was gone before anything had reached the client, so another may be asked."""


class RefusedError(Exception):
    """The replica is full (429) or cannot answer any more (503), so another may be asked; `answer` is what it said."""

    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass(frozen=True)
class Asked:
    """One request, whole, as a replica is sent it."""

    method: str
    path: str
    """With the query, as the client wrote it."""
    headers: CIMultiDict[str]
    body: bytes
    deadline_s: float
    """When the answer must be done, on the clock of `time.monotonic`."""


async def read_request(request: web.Request, limits: ServeConfig, token: str) -> Asked:
    """The whole request. Raises ApiError 413 before more than the limit is held."""
    arrived_s = time.monotonic()
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        message = f"the body is larger than {limits.max_body_bytes} bytes, the most that is read. Send less."
        raise ApiError(message, 413) from error
    headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in HOP_HEADERS)
    headers[TOKEN_HEADER] = token
    headers.setdefault(REQUEST_ID_HEADER, uuid.uuid4().hex)  # one for all replicas that are asked
    return Asked(request.method, request.raw_path, headers, body, arrived_s + wanted_s(request, limits))


def wanted_s(request: web.Request, limits: ServeConfig) -> float:
    """The time that the client gives; a header that is no such thing counts as absent here, and is refused by the replica."""
    try:
        asked_s = float(request.headers.get(TIMEOUT_HEADER, "inf"))
    except ValueError:
        return limits.request_timeout_s
    return min(asked_s, limits.request_timeout_s) if asked_s > 0 else limits.request_timeout_s


async def ask(
    session: aiohttp.ClientSession, url: str, asked: Asked, request: web.Request, span: Span, note_first_s: Callable[[float], None]
) -> web.StreamResponse:
    """The answer of the replica at `url`: a stream is sent on as it comes, anything else is given back whole; `span` is told how it ends.

    `note_first_s` is told after how many seconds a stream began. Raises LostError and RefusedError, before anything has gone to the client.
    """
    left_s = max(asked.deadline_s - time.monotonic(), 0.001)
    timeout = aiohttp.ClientTimeout(total=left_s + GRACE_S, sock_connect=CONNECT_S)
    asked_s = time.monotonic()
    target = URL(url + asked.path, encoded=True)
    try:
        async with session.request(
            asked.method, target, data=asked.body, headers=asked.headers, allow_redirects=False, timeout=timeout
        ) as answer:
            if answer.content_type == EVENT_STREAM:
                note_first_s(time.monotonic() - asked_s)
                return await _relay(answer, request, span)
            whole = web.Response(status=answer.status, body=await answer.read(), headers=_kept(answer))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise LostError from error
    if whole.status in REFUSALS:
        raise RefusedError(whole)
    return whole


async def _relay(answer: aiohttp.ClientResponse, request: web.Request, span: Span) -> web.StreamResponse:
    """Sends whole events on as they come. Where the replica is lost on the way, the last event is an error. Never raises LostError."""
    response = web.StreamResponse(status=answer.status, headers=_kept(answer))
    try:
        await response.prepare(request)
        async for events in _whole_events(answer, span):
            await response.write(events)
        await response.write_eof()
    except ConnectionError:  # the client has left; leaving the answer unread ends it at the replica
        pass
    return response


async def _whole_events(answer: aiohttp.ClientResponse, span: Span):  # type: ignore[no-untyped-def]
    """The events as they come, several together where they came so; an error event where they end too soon."""
    held = b""
    try:
        async for part in answer.content.iter_any():
            held += part
            end = held.rfind(EVENT_END) + len(EVENT_END)
            if end >= len(EVENT_END):
                yield held[:end]
                held = held[end:]
    except (aiohttp.ClientError, TimeoutError, OSError):
        span.fail("lost")
        error = ApiError("the replica ended before the answer was done. Ask again.", 503, code="replica_lost")
        yield error_event(error.body)


def _kept(answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in HOP_HEADERS)
