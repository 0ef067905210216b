"""The process of an engine: takes requests in between the steps of a batch, and tells after each step what they got.

A step computes for tens of milliseconds, and the libraries keep Python's global lock for as long. Inside the server's process nothing else
could run but between two steps: with OpenVINO 32 requests at once took 1.7 s to be let in, and a third of the throughput was lost.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from serving.engines.base import Sampling, read_sampling
from serving.engines.messages import JsonLines, News
from serving.engines.outbox import Outbox

LARGER_THAN_CACHE = "prompt and answer are larger than the engine's whole cache. Ask for fewer tokens, or raise serve.cache_gb."
"""Refusal of a request that could never be answered, however long it waited."""


class Batch(Protocol):
    """The requests that one library answers together, by their numbers."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def figures(self) -> tuple[int, int, float, *tuple[int | None, ...]]:
        """The values of `base.Figures` in their order, as of the last step; those at the end that are None may be left out."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters in memory; empty where there are none."""

    def add(self, number: int, prompt_ids: list[int], sampling: Sampling) -> News | None:
        """Takes a request in; news only where it is refused."""

    def cancel(self, number: int) -> None:
        """Forgets a request."""

    def step(self) -> list[News]:
        """Computes the next tokens and gives what each request got."""

    def clear(self) -> None:
        """Frees what the running requests hold."""


def answer_until_closed(batch: Batch, lines: JsonLines, stream_interval_s: float = 0.0) -> None:
    """Steps and hands over until the other side closes. A step that raises is the last one: its message is sent, and nothing raised."""
    outbox = Outbox(stream_interval_s)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _take_in(batch, outbox, lines.read(wait=not batch.has_work))
            if batch.has_work:
                try:
                    outbox.put(batch.step())
                except Exception as error:  # a process edge: whatever the library raises must reach the requests that wait
                    lines.write({"failure": f"the engine failed: {type(error).__name__}: {error}"})
                    return
            news = outbox.take()
            if news or not batch.has_work:
                lines.write({"news": news, "figures": batch.figures, "adapters": list(batch.adapters)})
    batch.clear()


def run_engine(file_descriptor: int, make_batch: Callable[..., Batch]) -> None:
    """Makes the batch that the first message describes, then answers; whatever `make_batch` raises is told, and the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when this process ends
    with socket.socket(fileno=file_descriptor) as connection:
        lines = JsonLines(connection)
        with contextlib.suppress(EOFError, ConnectionError):
            first: list[Any] = []
            while not first:
                first = lines.read(wait=True)
            try:
                batch = make_batch(**first[0]["settings"])
            except Exception as error:  # a process edge: each library has errors of its own for a model that it cannot read
                lines.write({"failure": f"{type(error).__name__}: {error}"})
                return
            lines.write({"ready": True})
            answer_until_closed(batch, lines, first[0]["stream_interval_s"])


def _take_in(batch: Batch, outbox: Outbox, messages: list[Any]) -> None:
    for message in messages:
        if "cancel" in message:
            batch.cancel(message["cancel"])
            outbox.forget(message["cancel"])
        elif refused := batch.add(message["add"], message["ids"], read_sampling(message["sampling"])):
            outbox.put([refused])
