"""The replicas that live now, and how they come and go."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
import time
from dataclasses import dataclass

from pydantic import ValidationError

from serving.announcement import MAX_LINE_BYTES, Announcement, keep_asking

HELLO_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Replica:
    """One replica as the front sees it."""

    standing: Announcement
    num_running: int = 0
    """Requests that this front has there."""
    has_failed: bool = False
    """Whether it said that its engine cannot answer; Ray Serve will replace it."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.standing.replica

    @property
    def url(self) -> str:
        """Where it answers."""
        host = self.standing.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.standing.port}"

    @property
    def price(self) -> float:
        """What one of its places costs, in US dollars an hour."""
        return self.standing.usd_per_hour / self.standing.num_places

    @property
    def is_usable(self) -> bool:
        """Whether it may be sent a request."""
        return not (self.has_failed or self.standing.is_draining)


class Replicas:
    """All replicas with an open connection; `token` is what each must show."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._by_name: dict[str, Replica] = {}
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_parting = False
        self.has_some = threading.Event()
        """Set once the first replica is there."""

    @property
    def all(self) -> list[Replica]:
        """Every replica, usable or not."""
        return list(self._by_name.values())

    @property
    def usable(self) -> list[Replica]:
        """Those that may be sent a request."""
        return [replica for replica in self._by_name.values() if replica.is_usable]

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a replica has come, changed or gone, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def part(self, timeout_s: float) -> None:
        """Tells every replica that nothing more will be asked, and returns when all have closed, or when the time is up."""
        self._is_parting = True
        for writer in self._writers:
            with contextlib.suppress(OSError, RuntimeError):  # it has gone by itself at this moment
                writer.write_eof()
        deadline_s = time.monotonic() + timeout_s
        while self._writers and (left_s := deadline_s - time.monotonic()) > 0:
            await self.wait_for_change(left_s)

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection of a replica for as long as it lives; a stranger's is closed without a word."""
        if self._is_parting:
            writer.close()
            return
        replica: Replica | None = None
        keep_asking(writer.get_extra_info("socket"))
        self._writers.add(writer)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                standing = self._read(await reader.readline())
            replica = Replica(standing)
            self._by_name[replica.name] = replica
            self._note_change()
            self.has_some.set()
            while line := await reader.readline():
                replica.standing = self._read(line)
                self._note_change()
        except (TimeoutError, ConnectionError, ValueError):  # ValueError: a line too long, of another form, or with another token
            pass
        except asyncio.CancelledError:  # the front ends; Python 3.11 would print what a connection's task is cancelled by
            pass
        finally:
            if replica is not None and self._by_name.get(replica.name) is replica:
                del self._by_name[replica.name]
            self._writers.discard(writer)
            self._note_change()
            writer.close()

    def _read(self, line: bytes) -> Announcement:
        try:
            standing = Announcement.model_validate_json(line)
        except ValidationError as error:
            raise ValueError("not an announcement") from error
        if not hmac.compare_digest(standing.token.get_secret_value().encode(), self._token.encode()):
            raise ValueError("another token")
        return standing

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def listen(replicas: Replicas, host: str, port: int = 0) -> asyncio.Server:
    """The socket that replicas announce themselves at; on a free port for 0."""
    return await asyncio.start_server(replicas.meet, host, port, limit=MAX_LINE_BYTES)
