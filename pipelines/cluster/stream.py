"""Answers that go on for as long as something happens, read so that the reader can do other things meanwhile."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Collection, Generator, Iterator, Mapping

import urllib3

from infra.errors import SlipwayError, TransientError
from infra.patience import waits_s
from pipelines.cluster.client import Cluster, answer_of
from pipelines.cluster.refusals import Answer, known_error

CLOSING_S = 1.0


def open_stream(
    cluster: Cluster,
    path: str,
    query: Mapping[str, str],
    purpose: str,
    *,
    silence_s: float,
    idle_s: float,
    expected: Collection[int] = (),
) -> Generator[None, None, urllib3.BaseHTTPResponse | Answer]:
    """Opens a stream, with None each `idle_s` while the server is away; returns it, or the answer if it is one of the `expected` codes.

    The stream counts as lost after `silence_s` without a byte. Raises ConfigError or TransientError as `Cluster.request` does.
    """
    deadline_s = time.monotonic() + cluster.patience_s
    for pause_s in waits_s():
        try:
            response = cluster.send("GET", path, query, None, "application/json", silence_s)
            if response.status == 200:
                return response
            answer = answer_of(response, response.data)
            if answer.status in expected:
                return answer
            error: SlipwayError = known_error(answer, purpose)
        except urllib3.exceptions.HTTPError as lost:
            error = cluster.away(lost, purpose)
        if not isinstance(error, TransientError) or time.monotonic() + pause_s > deadline_s:
            raise error
        yield from pause(pause_s, idle_s)
    raise AssertionError("unreachable: there is always another wait")


def pause(pause_s: float, idle_s: float) -> Iterator[None]:
    """Waits, with None after each `idle_s`."""
    end_s = time.monotonic() + pause_s
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, idle_s))
        yield None


@contextlib.contextmanager
def lines_of(response: urllib3.BaseHTTPResponse, idle_s: float) -> Iterator[Iterator[bytes | None]]:
    """The lines of the response until it ends or is cut, and None after each `idle_s` without one; closes it after the block."""
    arrived: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(response, arrived), name="cluster-stream", daemon=True)
    reader.start()
    try:
        yield _until_end(arrived, idle_s)
    finally:
        _cut(response)
        reader.join(CLOSING_S)
        response.close()
        response.release_conn()


def _until_end(arrived: queue.SimpleQueue[bytes | None], idle_s: float) -> Iterator[bytes | None]:
    while True:
        try:
            line = arrived.get(timeout=idle_s)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _read(response: urllib3.BaseHTTPResponse, arrived: queue.SimpleQueue[bytes | None]) -> None:
    """Puts each whole line into the queue, and None at the end; half a line before a cut is none."""
    rest = b""
    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError, ValueError):  # how it ends says nothing that the reader needs
        for chunk in response.stream(amt=None, decode_content=True):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                arrived.put(line)
    arrived.put(None)


def _cut(response: urllib3.BaseHTTPResponse) -> None:
    """Ends a read that waits in the other thread: only the socket can."""
    connection = getattr(response, "connection", None)
    sock = getattr(connection, "sock", None)
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
