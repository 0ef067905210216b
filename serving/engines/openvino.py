"""OpenVINO GenAI's continuous batching as an engine.

- One thread owns the pipeline: it admits, steps, reads and cancels, so no call of the library ever meets another.
- After each step the tokens of all requests go to the event loop in one call; a consumer that is late finds them joined in one chunk.
- Prefix caching is on: a shared system prompt is computed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import random
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

from infra.errors import ArtifactError, SlipwayError
from serving.engines.base import Chunk, EngineError, Figures, FinishReason, RequestRefusedError, Sampling

GREEDY_TEMPERATURE = 1e-4  # below this, dividing by the temperature leaves one token with all the mass
# A chunk costs the server about as much for one token as for ten, so the more requests share the processor, the longer each collects:
# one request gets every token at once, 32 get theirs at most every 64 ms, which nobody reads slower than.
CHUNK_INTERVAL_S = 0.002
IDLE = Figures(num_running=0, num_waiting=0, cache_usage=0.0)


@dataclass(eq=False, slots=True)
class _Request:
    """One request. Only the event loop touches it, but for `handle`, which is the stepping thread's."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: SlipwayError | None = None
    is_abandoned: bool = False
    woken_s: float = 0.0
    handle: Any = None


@dataclass(frozen=True, slots=True)
class _News:
    """What one step brought to one request."""

    request: _Request
    ids: list[int]
    finish_reason: FinishReason | None = None
    error: SlipwayError | None = None


class OpenVinoEngine:
    """A model folder with `openvino_model.xml`, answering up to `max_running_requests` together with `cache_gb` GB of KV cache."""

    def __init__(self, model_dir: Path, max_running_requests: int, cache_gb: int, num_threads: int | None = None) -> None:
        self._model_dir = model_dir
        self._max_running_requests = max_running_requests
        self._cache_gb = cache_gb
        self._num_threads = num_threads
        self._mailbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._active: dict[int, _Request] = {}
        self._numbers = itertools.count()
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
        """The answer as it is made; closing the generator cancels the request. Raises EngineError and RequestRefusedError."""
        request = _Request(prompt_ids, sampling)
        self._mailbox.put(request)
        # Looked at after the put: a thread that dies sets its failure first and empties the mailbox then.
        if self._failure is not None:
            raise EngineError(self._failure)
        try:
            while request.finish_reason is None:
                await request.arrived.wait()
                request.arrived.clear()
                if request.error is not None:
                    raise request.error
                ids, request.ids = request.ids, []
                yield Chunk(ids, request.finish_reason)
        finally:
            if request.finish_reason is None and request.error is None:
                request.is_abandoned = True
                self._mailbox.put(request)

    def _load(self) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = self._cache_gb
        scheduler.max_num_seqs = self._max_running_requests
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": self._num_threads} if self._num_threads else {}
        try:
            return openvino_genai.ContinuousBatchingPipeline(str(self._model_dir), scheduler, "CPU", properties)
        except RuntimeError as error:
            raise ArtifactError(f"{self._model_dir}: OpenVINO cannot load it: {error}. Run the quantize step again.") from error

    def _run(self) -> None:
        """The stepping thread: until told to stop, or until the pipeline fails."""
        reason = "the engine was stopped"
        try:
            while self._take_mail():
                self._pipeline.step()
                self._hand_over([_read(request) for request in self._active.values() if _has_news(request)])
                self._note_figures()
            self._drop_all()
        except Exception as error:  # a thread's edge: whatever the pipeline raises must reach the requests that wait
            reason = f"the engine failed: {type(error).__name__}: {error}"
        self._failure = reason
        self._figures = IDLE
        self._hand_over([_News(request, [], error=EngineError(reason)) for request in (*self._active.values(), *self._late_mail())])

    def _take_mail(self) -> bool:
        """Admits and cancels as the event loop asked; waits while there is nothing to step. False on the word to stop."""
        while True:
            try:
                request = self._mailbox.get(block=not self._pipeline.has_non_finished_requests())
            except queue.Empty:
                return True
            if request is None:
                return False
            if not request.is_abandoned:
                self._admit(request)
            elif self._active.pop(id(request), None) is not None:
                request.handle.cancel()  # the next step drops it and frees its cache

    def _drop_all(self) -> None:
        """Frees what the running requests hold; the pipeline's destructor reports it as a leak otherwise."""
        for request in self._active.values():
            request.handle.cancel()
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _late_mail(self) -> Iterable[_Request]:
        """What lies in the mailbox when the thread ends."""
        while not self._mailbox.empty():
            if (request := self._mailbox.get()) is not None:
                yield request

    def _admit(self, request: _Request) -> None:
        self._active[id(request)] = request  # first, so that no error below can lose it
        ids = openvino.Tensor(numpy.asarray([request.prompt_ids], dtype=numpy.int64))
        try:
            request.handle = self._pipeline.add_request(next(self._numbers), ids, _generation_config(request.sampling))
        except (RuntimeError, TypeError, ValueError) as error:  # refuses this one request; the others go on
            self._hand_over([_News(request, [], error=RequestRefusedError(f"the engine refuses this request: {error}"))])

    def _hand_over(self, news: list[_News]) -> None:
        """Gives the news of one step to the event loop, in one call for all requests."""
        for item in news:
            if item.finish_reason is not None or item.error is not None:
                self._active.pop(id(item.request), None)
        if news:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_deliver, news)

    def _note_figures(self) -> None:
        metrics = self._pipeline.get_metrics()
        num_running = min(metrics.scheduled_requests, len(self._active))
        self._figures = Figures(num_running, len(self._active) - num_running, metrics.cache_usage / 100)


def _deliver(news: list[_News]) -> None:
    """Runs on the event loop: joins what each request got to what it has not yet taken, and wakes those whose chunk is due."""
    now_s = time.monotonic()
    for item in news:
        request = item.request
        request.ids.extend(item.ids)
        request.finish_reason = item.finish_reason
        request.error = item.error
        if item.finish_reason or item.error or now_s - request.woken_s >= CHUNK_INTERVAL_S * len(news):
            request.woken_s = now_s
            request.arrived.set()


def _has_news(request: _Request) -> bool:
    return bool(request.handle.can_read() or request.handle.get_status() != openvino_genai.GenerationStatus.RUNNING)


def _read(request: _Request) -> _News:
    """The tokens that the last step made for `request`."""
    ids: list[int] = []
    reason = openvino_genai.GenerationFinishReason.NONE
    while request.handle.can_read():
        for output in request.handle.read().values():  # one sequence, or none where the request was dropped
            ids += output.generated_ids
            reason = output.finish_reason
    if reason == openvino_genai.GenerationFinishReason.LENGTH:
        return _News(request, ids, "length")
    if reason == openvino_genai.GenerationFinishReason.STOP:
        return _News(request, ids[:-1] if ids and ids[-1] in request.sampling.stop_ids else ids, "stop")
    if request.handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
        text = "prompt and answer are larger than the engine's whole cache. Ask for fewer tokens, or raise serve.cache_gb."
        return _News(request, ids, error=RequestRefusedError(text))
    return _News(request, ids)


def _generation_config(sampling: Sampling) -> Any:
    is_greedy = sampling.temperature < GREEDY_TEMPERATURE
    config = openvino_genai.GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=not is_greedy,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop_token_ids=set(sampling.stop_ids),
        ignore_eos=not sampling.stop_ids,
    )
    if not is_greedy:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        # OpenVINO starts every request at seed 0, which would give all users the same "random" answer.
        config.rng_seed = random.getrandbits(64) if sampling.seed is None else sampling.seed % (1 << 64)
        if sampling.top_k is not None:
            config.top_k = sampling.top_k
    return config
