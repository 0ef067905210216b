"""An engine whose model is computed in a process of its own (`child.py` says why).

- The process ends with this one, however this one ends.
- It may run under another Python (`serving/interpreter.py`): the two share nothing but the messages.
- The tokens of all requests come in one message, at most one a step (`outbox.py`); a consumer that is late finds them joined in one chunk.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from infra.errors import ArtifactError, SlipwayError
from infra.settings import child_environment
from serving.engines.base import Capabilities, Chunk, EngineError, Figures, FinishReason, RequestRefusedError, Sampling, TokenLogprob
from serving.engines.messages import News, encode_message

IDLE = Figures(num_running=0, num_waiting=0, cache_usage=0.0)
MESSAGE_BYTES = 1 << 24


@dataclass(eq=False, slots=True)
class _Request:
    """What one request has got and not yet taken."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: SlipwayError | None = None


class ProcessEngine:
    """The model in `model_dir`, computed by `PYTHON -m PROGRAM`, which is sent `settings` first.

    `variables` go before what this process's environment says, and that before `default_variables`.
    Tokens of a request that are made within `stream_interval_s` come together.
    """

    def __init__(
        self,
        model_dir: Path,
        program: str,
        settings: Mapping[str, Any],
        capabilities: Capabilities,
        python: Path | None = None,
        variables: Mapping[str, str] | None = None,
        stream_interval_s: float = 0.0,
        default_variables: Mapping[str, str] | None = None,
    ) -> None:
        self._model_dir = model_dir
        self._command = [str(python or sys.executable), "-m", program]
        self._first_message = {"stream_interval_s": stream_interval_s, "settings": settings}
        self._capabilities = capabilities
        self._environment = {**(default_variables or {}), **child_environment("serving"), **(variables or {})}
        self._numbers = itertools.count()
        self._requests: dict[int, _Request] = {}
        self._failure: str | None = "the engine is not started"
        self._figures = IDLE
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads the model. Raises ArtifactError when the library cannot read it."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._launch(), limit=MESSAGE_BYTES)
        self._send(self._first_message)
        try:
            line = await self._reader.readline()
        except ConnectionError:  # it ended before it had read what it was sent
            line = b""
        answer = json.loads(line) if line else {"failure": "its process ended while it loaded"}
        if "failure" in answer:
            await self._close()
            name = self._capabilities.engine
            raise ArtifactError(f"{self._model_dir}: {name} cannot load it: {answer['failure']}. Run the step that makes it again.")
        self._failure = None
        self._listener = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Ends the engine's process; requests still running get EngineError."""
        self._fail("the engine was stopped")
        await self._close()

    @property
    def capabilities(self) -> Capabilities:
        """What may be asked of it."""
        return self._capabilities

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""
        return self._failure

    @property
    def figures(self) -> Figures:
        """Requests and cache as of the last step."""
        return self._figures

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made; closing the generator cancels the request. Raises EngineError and RequestRefusedError."""
        if self._failure is not None:
            raise EngineError(self._failure)
        number, request = next(self._numbers), _Request()
        self._requests[number] = request
        self._send({"add": number, "ids": list(prompt_ids), "sampling": asdict(sampling)})
        try:
            while request.finish_reason is None:
                await request.arrived.wait()
                request.arrived.clear()
                if request.error is not None:
                    raise request.error
                ids, request.ids = request.ids, []
                logprobs, request.logprobs = request.logprobs, []
                yield Chunk(ids, request.finish_reason, logprobs)
        finally:
            if self._requests.pop(number, None) is not None and self._failure is None:
                self._send({"cancel": number})

    def _launch(self) -> socket.socket:
        """Starts the process; our end of the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )
        return ours

    def _send(self, message: Mapping[str, Any]) -> None:
        self._writer.write(encode_message(message))

    async def _listen(self) -> None:
        """Hands out what the process sends until it ends or fails."""
        reason = "the engine's process ended"
        try:
            async for line in self._reader:
                message = json.loads(line)
                if "failure" in message:
                    reason = message["failure"]
                    break
                self._figures = replace(Figures(*message["figures"]), adapters=tuple(message["adapters"]))
                self._deliver(message["news"])
        except ConnectionError:  # killed with data on its way: the same as an end
            pass
        self._fail(reason)

    def _deliver(self, news: Sequence[News]) -> None:
        """Joins what each request got to what it has not yet taken, and wakes it."""
        for number, ids, logprobs, finish_reason, refusal in news:
            is_last = bool(finish_reason or refusal)
            request = self._requests.pop(number, None) if is_last else self._requests.get(number)
            if request is None:  # cancelled while the step ran
                continue
            request.ids.extend(ids)
            if logprobs:
                request.logprobs.extend(TokenLogprob(own, tuple((token, value) for token, value in top)) for own, top in logprobs)
            request.finish_reason = cast("FinishReason | None", finish_reason)
            request.error = RequestRefusedError(refusal) if refusal else None
            request.arrived.set()

    def _fail(self, reason: str) -> None:
        """Ends all requests, and refuses later ones; the first reason stands."""
        self._failure = self._failure or reason
        self._figures = IDLE
        for request in self._requests.values():
            request.error = EngineError(self._failure)
            request.arrived.set()
        self._requests.clear()

    async def _close(self) -> None:
        """Closes the connection, which ends the process, and waits for that."""
        self._writer.close()
        if self._listener is not None:
            await self._listener
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
