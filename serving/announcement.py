"""How a replica makes itself known: a connection to the front that stays open for as long as the replica lives.

The first line says who it is and where it answers; the same line again says that something about it has changed. The front takes
the end of the connection, which the kernel sends however a process ends, as the end of the replica. A front that has no more to ask
ends its side first, and waits until the replicas have ended theirs: what they still have to tell of is then told. On a cluster there are
several fronts, and a replica has such a connection to each (`fleet.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, SecretStr

from infra.config import Config

TOKEN_HEADER = "X-Slipway-Front"
RETRY_S = 0.5
MAX_LINE_BYTES = 1 << 16
# A machine that loses its power sends no end of its connections: after so many seconds without a word, and as many questions a second
# apart without an answer, the kernel ends them here.
QUIET_S, NUM_QUESTIONS = 5, 4


def keep_asking(connection: socket.socket) -> None:
    """Lets the kernel end a connection whose other machine is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, QUIET_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_QUESTIONS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (QUIET_S + NUM_QUESTIONS) * 1000)


class FrontAddress(Config):
    """Where replicas announce themselves, and the secret that each side knows the other by."""

    host: str
    port: int
    token: SecretStr

    def as_json(self) -> str:
        """The address with its secret in the clear, for the replicas only."""
        return _in_the_clear(self)


class Place(Config):
    """Where a replica stands: the fronts that it tells of itself, and where it listens."""

    fronts: tuple[FrontAddress, ...]
    """Each a name or an address; a name may stand for several fronts, and for others later."""
    host: str | None = None
    """Its own address; absent means the one at which the first front reaches this machine."""
    ports: tuple[int, int] = (0, 0)
    """First and last port to choose from; 0 means any."""
    node_dir: Path | None = None
    """Folder by which its node is told to drain (`node.py`); absent where there is no such word."""

    def as_json(self) -> str:
        """The place with its secrets in the clear, for the replica only."""
        return json.dumps(self.model_dump(mode="json") | {"fronts": [json.loads(front.as_json()) for front in self.fronts]})


class Announcement(Config):
    """One replica, as it stands now."""

    token: SecretStr
    replica: str
    """Its name, unique among those that live."""
    host: str
    port: int = Field(ge=1, le=65535)
    num_places: int = Field(ge=1)
    """Requests it answers together; more would wait there."""
    pool: str = ""
    """The pool that it belongs to."""
    usd_per_hour: float = Field(0.0, ge=0)
    is_draining: bool = False
    """Whether it ends once its running requests are done, and takes no new ones."""
    adapters: tuple[str, ...] = ()
    """Those that it holds in memory."""
    is_counted_here: bool = True
    """Whether this front tells Prometheus of it: of several fronts one does, or every sum would count it several times."""

    def as_line(self) -> bytes:
        """The announcement as it is sent, its secret in the clear."""
        return _in_the_clear(self).encode() + b"\n"


def _in_the_clear(spoken: FrontAddress | Announcement) -> str:
    return json.dumps(spoken.model_dump(mode="json") | {"token": spoken.token.get_secret_value()})


class Announcer:
    """Keeps one front told of a replica; connects again where the connection ends before the replica does.

    `part` is called, in a thread, when the front has ended its side; the replica's stays open until it is done.
    """

    def __init__(self, front: FrontAddress, describe: Callable[[], Announcement], part: Callable[[], None] = lambda: None) -> None:
        self._front = front
        self._describe = describe
        self._part = part
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    @property
    def is_connected(self) -> bool:
        """Whether the front knows of the replica."""
        return self._writer is not None

    def update(self) -> None:
        """Tells how the replica stands now."""
        if self._writer is not None:
            self._writer.write(self._describe().as_line())

    async def stop(self) -> None:
        """Closes the connection: the replica is gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, self._writer = await asyncio.open_connection(self._front.host, self._front.port)
                try:
                    keep_asking(self._writer.get_extra_info("socket"))
                    self.update()
                    await reader.read()  # the front sends nothing: this ends with its side of the connection
                    await asyncio.to_thread(self._part)
                finally:
                    self._writer.close()
                    self._writer = None
            await asyncio.sleep(RETRY_S)
