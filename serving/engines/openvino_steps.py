"""`python -m serving.engines.openvino_steps FD`: the OpenVINO pipeline in a process of its own, which `openvino.py` starts and talks to.

`ContinuousBatchingPipeline.step()` keeps Python's global lock for as long as it computes. Inside the server's process nothing else could
run but between two steps of 30 ms: 32 requests at once took 1.7 s to be let in, and a third of the throughput was lost.

Messages are JSON lines over the socket FD.

- In: the settings of `load`, then `{"add": number, "ids", "sampling"}` and `{"cancel": number}`; the end of the stream ends the process.
- Out: `{"ready": true}`, then after each step `{"news": [[number, ids, finish_reason, refusal], ...], "figures": [running, waiting,
  cache share]}`; last `{"failure": text}` where it could not load or go on.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

import numpy
import openvino
import openvino_genai

from serving.engines.base import Sampling
from serving.engines.messages import encode_message

GREEDY_TEMPERATURE = 1e-4  # below this, dividing by the temperature leaves one token with all the mass
RECEIVE_BYTES = 1 << 16

News = tuple[int, list[int], str | None, str | None]
"""Number of the request, its new ids, why it ended, why it was refused."""


class JsonLines:
    """Messages over a socket, for a process without an event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def read(self, wait: bool) -> list[Any]:
        """The messages that have arrived; with `wait` it returns with something new only. Raises EOFError when the other side closed."""
        try:
            data = self._connection.recv(RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def write(self, message: Mapping[str, Any]) -> None:
        """Sends one message; waits where the other side is behind."""
        self._connection.sendall(encode_message(message))


class Batch:
    """The requests in a pipeline, by their numbers."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._handles: dict[int, Any] = {}
        self._stop_ids: dict[int, tuple[int, ...]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.pipeline.has_non_finished_requests())

    @property
    def figures(self) -> tuple[int, int, float]:
        """Requests running and waiting, and the share of the cache in use, as of the last step."""
        metrics = self.pipeline.get_metrics()
        num_running = min(metrics.scheduled_requests, len(self._handles))
        return num_running, len(self._handles) - num_running, metrics.cache_usage / 100

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where the pipeline refuses it."""
        ids = openvino.Tensor(numpy.asarray([prompt_ids], dtype=numpy.int64))
        try:
            self._handles[number] = self.pipeline.add_request(number, ids, generation_config(sampling))
        except (RuntimeError, TypeError, ValueError) as error:  # refuses this one request; the others go on
            return number, [], None, f"the engine refuses this request: {error}"
        self._stop_ids[number] = sampling.stop_ids
        return None

    def cancel(self, number: int) -> None:
        """Forgets a request; the next step frees its cache."""
        if handle := self._forget(number):
            handle.cancel()

    def clear(self) -> None:
        """Frees what the running requests hold; the pipeline's destructor reports it as a leak otherwise."""
        for number in list(self._handles):
            self.cancel(number)
        if self.has_work:
            self.pipeline.step()

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""
        self.pipeline.step()
        news = [self._read(number) for number, handle in self._handles.items() if has_news(handle)]
        for number, _, finish_reason, refusal in news:
            if finish_reason or refusal:
                self._forget(number)
        return news

    def _forget(self, number: int) -> Any:
        self._stop_ids.pop(number, None)
        return self._handles.pop(number, None)

    def _read(self, number: int) -> News:
        handle, stop_ids = self._handles[number], self._stop_ids[number]
        ids: list[int] = []
        reason = openvino_genai.GenerationFinishReason.NONE
        while handle.can_read():
            for output in handle.read().values():  # one sequence, or none where the request was dropped
                ids += output.generated_ids
                reason = output.finish_reason
        if reason == openvino_genai.GenerationFinishReason.LENGTH:
            return number, ids, "length", None
        if reason == openvino_genai.GenerationFinishReason.STOP:
            return number, ids[:-1] if ids and ids[-1] in stop_ids else ids, "stop", None
        if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
            text = "prompt and answer are larger than the engine's whole cache. Ask for fewer tokens, or raise serve.cache_gb."
            return number, ids, None, text
        return number, ids, None, None


def has_news(handle: Any) -> bool:
    """Whether a request has new tokens or has ended."""
    return bool(handle.can_read() or handle.get_status() != openvino_genai.GenerationStatus.RUNNING)


def generation_config(sampling: Sampling) -> Any:
    """The library's own settings of one request."""
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


def load(model_dir: str, max_running_requests: int, cache_gb: int, num_threads: int | None) -> Any:
    """The pipeline of a model folder. Raises RuntimeError when OpenVINO cannot read it."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = cache_gb
    scheduler.max_num_seqs = max_running_requests
    scheduler.enable_prefix_caching = True  # a shared system prompt is computed once
    properties = {"INFERENCE_NUM_THREADS": num_threads} if num_threads else {}
    return openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", properties)


def answer_until_closed(pipeline: Any, lines: JsonLines) -> None:
    """Steps and hands over until the other side closes. A step that raises is the last one: its message is sent, and nothing raised."""
    batch = Batch(pipeline)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            news = _take_in(batch, lines.read(wait=not batch.has_work))
            if batch.has_work:
                try:
                    news += batch.step()
                except Exception as error:  # a process edge: whatever the pipeline raises must reach the requests that wait
                    lines.write({"failure": f"the engine failed: {type(error).__name__}: {error}"})
                    return
            if news or not batch.has_work:
                lines.write({"news": news, "figures": batch.figures})
    batch.clear()


def _take_in(batch: Batch, messages: list[Any]) -> list[News]:
    refused: list[News] = []
    for message in messages:
        if "cancel" in message:
            batch.cancel(message["cancel"])
        elif news := batch.add(message["add"], message["ids"], Sampling(**message["sampling"])):
            refused.append(news)
    return refused


def main(file_descriptor: int) -> None:
    """Loads the model that the first message names, then answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when this process ends
    with socket.socket(fileno=file_descriptor) as connection:
        lines = JsonLines(connection)
        with contextlib.suppress(EOFError, ConnectionError):
            settings: list[Any] = []
            while not settings:
                settings = lines.read(wait=True)
            try:
                pipeline = load(**settings[0])
            except RuntimeError as error:
                lines.write({"failure": str(error)})
                return
            lines.write({"ready": True})
            answer_until_closed(pipeline, lines)


if __name__ == "__main__":
    main(int(sys.argv[1]))
