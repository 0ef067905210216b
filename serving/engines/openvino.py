"""OpenVINO GenAI's continuous batching as an engine.

- One thread owns the pipeline: it admits, steps, reads and cancels, so no call of the library ever meets another.
- After each step the tokens of all requests go to the event loop in one call; a consumer that is late finds them joined in one chunk.
- Prefix caching is on: a shared system prompt is computed once.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import random
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

from infra.errors import ArtifactError
from serving.engines.base import Chunk, EngineError, Figures, FinishReason, PromptTooLongError, Sampling

GREEDY_TEMPERATURE = 1e-4  # below this the division by the temperature leaves one token with all the mass
IDLE = Figures(num_running=0, num_waiting=0, cache_usage=0.0)


@dataclass(eq=False, slots=True)
class _Request:
    """One request: its left half belongs to the event loop, `handle` to the stepping thread."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: EngineError | None = None
    is_cancelled: bool = False
    handle: Any = None


@dataclass(frozen=True, slots=True)
class _News:
    """What one step brought to one request."""

    request: _Request
    ids: list[int]
    finish_reason: FinishReason | None = None
    error: EngineError | None = None


class OpenVinoEngine:
    """A model folder with `openvino_model.xml`, answering up to `max_running_requests` together with `cache_gb` GB of KV cache."""

    def __init__(self, model_dir: Path, max_running_requests: int, cache_gb: float, num_threads: int | None = None) -> None:
        self._model_dir = model_dir
        self._max_running_requests = max_running_requests
        self._cache_gb = cache_gb
        self._num_threads = num_threads
        self._mailbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._active: list[_Request] = []
        self._request_ids = itertools.count()
        self._failure: str | None = "the engine is not started"
        self._figures = IDLE
        self._pipeline: Any = None
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)

    async def start(self) -> None:
        """Loads the model off the event loop. Raises ArtifactError when OpenVINO cannot read it."""
        self._loop = asyncio.get_running_loop()
        self._pipeline = await asyncio.to_thread(self._load)
        self._failure = None
        self._thread.start()

    async def stop(self) -> None:
        """Ends the stepping thread; requests still running get EngineError."""
        if self._thread.is_alive():
            self._mailbox.put(None)
            await asyncio.to_thread(self._thread.join)
        self._pipeline = None

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""
        return self._failure

    @property
    def figures(self) -> Figures:
        """Requests and cache as of the last step."""
        return self._figures

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made; closing the generator cancels the request. Raises EngineError."""
        if self._failure is not None:
            raise EngineError(self._failure)
        request = _Request(prompt_ids, sampling)
        self._mailbox.put(request)
        try:
            while request.finish_reason is None:
                await request.arrived.wait()
                request.arrived.clear()
                ids, request.ids = request.ids, []
                if request.error is not None:
                    raise request.error
                yield Chunk(ids, request.finish_reason)
        finally:
            if request.finish_reason is None and request.error is None:
                request.is_cancelled = True
                self._mailbox.put(request)

    def _load(self) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(self._cache_gb))
        scheduler.max_num_seqs = self._max_running_requests
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": self._num_threads} if self._num_threads else {}
        try:
            return openvino_genai.ContinuousBatchingPipeline(str(self._model_dir), scheduler, "CPU", properties)
        except RuntimeError as error:
            raise ArtifactError(f"{self._model_dir}: OpenVINO cannot load it: {error}. Run the quantize step again.") from error

    def _run(self) -> None:
        """The stepping thread: until stopped, or until the pipeline fails."""
        reason = "the engine was stopped"
        try:
            while self._take_mail():
                self._pipeline.step()
                self._hand_over([news for request in self._active if (news := _read(request)) is not None])
        except Exception as error:  # a thread's edge: whatever the pipeline raises must reach the requests that wait
            reason = f"the engine failed: {type(error).__name__}: {error}"
        self._failure = reason
        self._figures = IDLE
        self._hand_over([_News(request, [], error=EngineError(reason)) for request in (*self._active, *self._late_mail())])

    def _take_mail(self) -> bool:
        """Admits and cancels what the event loop asked for; waits while there is nothing to step. False on the word to stop."""
        while True:
            try:
                request = self._mailbox.get(block=not self._active)
            except queue.Empty:
                return True
            if request is None:
                return False
            if request.is_cancelled:
                self._cancel(request)
            else:
                self._admit(request)

    def _admit(self, request: _Request) -> None:
        ids = numpy.asarray([request.prompt_ids], dtype=numpy.int64)
        try:
            request.handle = self._pipeline.add_request(next(self._request_ids), openvino.Tensor(ids), _generation_config(request.sampling))
        except RuntimeError as error:  # refuses this one request (a setting, its length); the others go on
            self._hand_over([_News(request, [], error=EngineError(f"the engine refuses this request: {error}"))])
            return
        self._active.append(request)

    def _cancel(self, request: _Request) -> None:
        if request in self._active:
            request.handle.cancel()
            self._active.remove(request)
            # The pipeline drops cancelled requests, and frees their cache, only in a step.
            self._pipeline.step()
            self._note_figures()

    def _hand_over(self, news: list[_News]) -> None:
        """Gives the news of one step to the event loop in one call."""
        self._active = [request for request in self._active if not any(item.request is request and _is_last(item) for item in news)]
        self._note_figures()
        if not news:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, news)
        except RuntimeError:  # the loop is closed, so nobody waits for the answers
            self._active.clear()
