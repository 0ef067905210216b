"""Who is calling: the first thing that a request meets.

- It gives each request an id, an owner and a deadline, in that order of refusal: 400, 401, 504.
- The deadline holds for all of it: reading the body, waiting for a place, making the answer, a client that reads slowly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra import api_keys
from infra.api_keys import ApiKey
from infra.errors import ConfigError
from serving.config import ServeConfig
from serving.errors import ApiError
from serving.openai_format import error_event
from serving.request_log import LOGGER_NAME
from serving.tracing import Span, Tracer, end_request

REQUEST_ID = re.compile(r"[\w.:/=+-]{1,128}", re.ASCII)
REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID_ATTRIBUTE = "slipway.request_id"
TIMEOUT_HEADER = "X-Request-Timeout-S"
KEYS_LOOK_S = 1.0  # a revoked key is refused after at most this long

log = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of a request before its body is read."""

    request_id: str
    key: ApiKey | None
    """Absent where no keys are asked for."""
    timeout_s: float
    span: Span
    """Its part of the request's trace."""

    @property
    def owner(self) -> str:
        """Whose share its requests count against; all share one where no keys are asked for."""
        return self.key.id if self.key else ""

    @property
    def weight(self) -> float:
        """Share beside the other keys."""
        return self.key.weight if self.key else 1.0

    def require_priority(self, priority: int) -> None:
        """Raises ApiError 403 where this key may not be so urgent."""
        if self.key is not None and priority < self.key.top_priority:
            message = f"priority {priority} is more urgent than this key may be; {self.key.top_priority} or more is needed."
            raise ApiError(message, 403, param="priority", code="priority_not_allowed")


class Keys:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keys: tuple[ApiKey, ...] = api_keys.read(path) if path else ()
        self._stamp = self._look() if path else None
        self._next_look_s = 0.0

    def check(self, headers: Headers) -> ApiKey | None:
        """The caller's key; None where no keys are asked for. Raises ApiError 401."""
        if self._path is None:
            return None
        self._refresh(self._path)
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = api_keys.find(self._keys, secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            found = "a key that is not valid here" if secret else "no key"
            raise ApiError(f"found {found}. Send one that is, as `Authorization: Bearer KEY`.", 401, code="invalid_api_key")
        return key

    def _refresh(self, path: Path) -> None:
        """Reads the file if it has changed. One that cannot be read changes nothing: the last good keys stand, and the log says so."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + KEYS_LOOK_S
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = api_keys.read(path)
        except ConfigError as error:
            log.error("%s The keys read before it stay valid.", error.message)

    def _look(self) -> tuple[int, int, int] | None:
        assert self._path is not None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


class Access:
    """Identifies the caller of every request, into `scope["state"]["caller"]`, and ends what is past its deadline."""

    def __init__(self, app: ASGIApp, limits: ServeConfig, tracer: Tracer) -> None:
        self._app = app
        self._limits = limits
        self._tracer = tracer
        self._keys = Keys(limits.api_keys_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        span = self._tracer.request(scope["method"], scope["path"], headers)
        try:
            caller = self._identify(headers, scope["path"], span)
        except ApiError as error:
            await _send_error(error, scope, receive, send)
            end_request(span, error.status)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._run(caller, scope, receive, send)

    def _identify(self, headers: Headers, path: str, span: Span) -> Caller:
        request_id = headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
        if REQUEST_ID.fullmatch(request_id) is None:
            raise ApiError(f"{REQUEST_ID_HEADER}: at most 128 letters, digits and ._:/=+- are taken. Shorten it or leave it out.")
        span.note({REQUEST_ID_ATTRIBUTE: request_id})
        key = None if path in self._limits.open_paths else self._keys.check(headers)
        return Caller(request_id, key, _timeout_s(headers, self._limits.request_timeout_s), span)

    async def _run(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        started: Mapping[str, Any] | None = None
        begun_s, outcome = time.perf_counter(), "failed"

        async def note_start(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (REQUEST_ID_HEADER.lower().encode(), caller.request_id.encode())]}
                started = message
            await send(message)

        try:
            async with asyncio.timeout(caller.timeout_s) as deadline:
                await self._app(scope, receive, note_start)
        except TimeoutError:
            if not deadline.expired():
                raise
            message = f"not done within {caller.timeout_s:g} s. Ask for fewer tokens, or for more time ({TIMEOUT_HEADER})."
            error = ApiError(message, 504, code="deadline_exceeded")
            if started is None:
                await _send_error(error, scope, receive, note_start)
            else:  # only a stream of events takes time between its start and its end
                await send({"type": "http.response.body", "body": error_event(error.body)})
            outcome = "deadline"
        else:
            outcome = "done" if started else "client left"
        finally:
            status = started["status"] if started else None
            self._log(caller, scope, outcome, status, time.perf_counter() - begun_s)
            end_request(caller.span, status, outcome)

    def _log(self, caller: Caller, scope: Scope, outcome: str, status: int | None, duration_s: float) -> None:
        fields = {"request_id": caller.request_id, "key": caller.owner, "method": scope["method"], "path": scope["path"]}
        fields |= {"status": status, "outcome": outcome, "duration_s": round(duration_s, 4)}
        if (model := scope["state"].get("model")) is not None:
            fields["model"] = model
        if caller.span.trace_id:
            fields["trace_id"] = caller.span.trace_id
        if self._limits.log_prompts and (asked := scope["state"].get("asked")):
            fields["asked"] = asked.model_dump(exclude_unset=True)
        log.info("request", extra={"fields": fields})


def _timeout_s(headers: Headers, limit_s: float) -> float:
    """The time that the request gets, at most `limit_s`. Raises ApiError 400 on a header that is no number of seconds."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return limit_s
    try:
        wanted_s = float(text)
    except ValueError:
        wanted_s = math.nan
    if not wanted_s > 0:
        raise ApiError(f"{TIMEOUT_HEADER}: {text[:40]!r} is no number of seconds above 0.", param=TIMEOUT_HEADER)
    return min(wanted_s, limit_s)


async def _send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send)
