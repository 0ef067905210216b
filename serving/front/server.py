"""The front on a thread and an event loop of its own, so that starting and ending Ray holds up no request."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import uvloop
from aiohttp import web
from pydantic import SecretStr

from infra.errors import ConfigError
from serving.announcement import FrontAddress
from serving.config import ServeConfig
from serving.front.proxy import Front
from serving.front.replicas import Replicas, listen
from serving.tracing import make_tracer

TOKEN_BYTES = 32
IDLE_CLIENT_S = 75.0
SHUTDOWN_S = 0.1  # `drain` has waited already
POLL_S = 0.02
STOP_TIMEOUT_S = 5.0
FAREWELL_S = 3.0  # replicas send their last traces within two


class FrontServer:
    """Listens for clients at the address in `limits`, and for replicas of this machine or cluster at `replica_host`.

    Of several fronts each is given the same port for replicas and the same token; alone, it takes a free one and makes one.
    """

    def __init__(
        self,
        limits: ServeConfig,
        replica_host: str,
        wake: Callable[[], None] = lambda: None,
        model_name: str = "",
        replica_port: int = 0,
        token: str | None = None,
    ) -> None:
        self._limits = limits
        self._replica_host = replica_host
        self._replica_port = replica_port
        self._token = token or secrets.token_urlsafe(TOKEN_BYTES)
        self.replicas = Replicas(self._token)
        self._tracer = make_tracer("front")
        self._front = Front(self.replicas, self._token, limits, wake, model_name, self._tracer)
        self._started: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def start(self) -> FrontAddress:
        """Begins to listen; where replicas announce themselves. Raises ConfigError where it cannot."""
        self._thread.start()
        return FrontAddress(host=self._replica_host, port=self._started.result(), token=SecretStr(self._token))

    def leave(self) -> None:
        """Says at `/health` that it is going, and goes on answering, each answer the last of its connection."""
        self._front.is_leaving = True

    def drain(self, timeout_s: float) -> None:
        """Refuses new requests from now on, and returns when the running ones are done or the time is up; then parts from the replicas."""
        self._front.is_draining = True
        deadline_s = time.monotonic() + timeout_s
        while self._front.num_open and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if self._loop is not None and self._thread.is_alive():
            wait([asyncio.run_coroutine_threadsafe(self.replicas.part(FAREWELL_S), self._loop)], STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ends the thread; requests that still run lose their connection."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(STOP_TIMEOUT_S)
        self._tracer.stop()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except Exception as error:
                if self._started.done():
                    raise
                self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        runner = web.AppRunner(
            self._front.app, access_log=None, handler_cancellation=True, keepalive_timeout=IDLE_CLIENT_S, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._limits.host, self._limits.port)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(f"{self._limits.host}:{self._limits.port} cannot be listened at: {error}. Take another port.") from error
            async with await self._open_door() as door:
                self._started.set_result(int(door.sockets[0].getsockname()[1]))
                await self._end.wait()
        finally:
            await runner.cleanup()

    async def _open_door(self) -> asyncio.Server:
        try:
            return await listen(self.replicas, self._replica_host, self._replica_port)
        except OSError as error:
            place = f"{self._replica_host}:{self._replica_port}"
            raise ConfigError(f"{place} cannot be listened at for replicas: {error}. Take another port (announce_port).") from error
