"""Answers that outlive their engine: it is started again when it fails, and what it was answering is asked again.

One request can bring an engine down, and all that ran beside it are under suspicion. Twice a request may run among others; one that saw
the engine fail both times runs alone, and where it fails even then it is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from serving.engines.base import EngineError
from serving.service import Service

T = TypeVar("T")

MAX_ATTEMPTS = 3
MAX_GIVEN_UP = 3
"""Requests given up one after another, with no answer in between, after which it is the engine that is at fault."""


class RequestFailedError(Exception):
    """The engine fails whenever it answers this request."""


class Keeper:
    """A running service, and another one when that fails."""

    def __init__(self, make: Callable[[], Service]) -> None:
        self._make = make
        self._service: Service | None = None
        self._starting = asyncio.Lock()
        self._crowd = _Crowd()
        self._num_given_up = 0

    async def service(self) -> Service:
        """The service that runs now, started where there is none. Raises ArtifactError where its engine cannot load the model."""
        async with self._starting:
            if self._service is not None and self._service.engine.failure is not None:
                await self.stop()
            if self._service is None:
                service = self._make()
                await service.engine.start()
                self._service = service
            return self._service

    async def stop(self) -> None:
        """Ends the engine."""
        service, self._service = self._service, None
        if service is not None:
            await service.engine.stop()

    async def ask(self, ask: Callable[[Service], Awaitable[T]]) -> T:
        """What `ask` gives with a service.

        Raises:
            RequestFailedError: the engine failed each time.
            EngineError: it does so whatever it is asked.
        """
        failure: str | None = None
        for attempt in range(1, MAX_ATTEMPTS + 1):
            async with self._crowd.alone() if attempt == MAX_ATTEMPTS else self._crowd.among_others():
                service = await self.service()
                try:
                    answer = await ask(service)
                except Exception:
                    if service.engine.failure is None:
                        self._num_given_up = 0
                        raise
                    failure = service.engine.failure
                else:
                    self._num_given_up = 0
                    return answer
        self._num_given_up += 1
        if self._num_given_up >= MAX_GIVEN_UP:
            raise EngineError(f"{failure}; the last {self._num_given_up} requests all ended so. The same command resumes.")
        raise RequestFailedError(f"the engine failed {MAX_ATTEMPTS} times while it answered this request: {failure}")


class _Crowd:
    """Many at once, or one alone; who wants to be alone goes first."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._num_among = 0
        self._num_alone_wanted = 0
        self._is_alone = False

    @asynccontextmanager
    async def among_others(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._num_alone_wanted)
            self._num_among += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_among -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._num_alone_wanted += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._num_among and not self._is_alone)
                self._is_alone = True
            try:
                yield
            finally:
                self._is_alone = False
        finally:
            self._num_alone_wanted -= 1
            async with self._changed:
                self._changed.notify_all()
