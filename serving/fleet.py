"""Keeps every front told of one replica, while fronts come and go.

- A front's name is looked up again and again: on Kubernetes a headless Service's gives the addresses of all gateway pods, those that are
  not ready yet too, for they become so by the replicas that announce themselves.
- A front that has left the name keeps its connection while it holds: it still has answers to finish.
- Of the fronts that know of the replica, the one with the lowest address tells Prometheus of it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from serving.announcement import Announcement, Announcer, FrontAddress

LOOK_S = 1.0

Address = tuple[str, int]


class Fleet:
    """The announcers of one replica, one a front; `part` is called in a thread when a front has ended its side."""

    def __init__(self, fronts: Sequence[FrontAddress], describe: Callable[[], Announcement], part: Callable[[], None]) -> None:
        self._fronts = fronts
        self._describe = describe
        self._part = part
        self._announcers: dict[Address, Announcer] = {}
        self._counted_at: Address | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    def update(self) -> None:
        """Tells how the replica stands now."""
        for announcer in self._announcers.values():
            announcer.update()

    async def stop(self) -> None:
        """Closes all connections: the replica is gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(announcer.stop() for announcer in self._announcers.values()))

    async def _run(self) -> None:
        while True:
            found = {address: front for front in self._fronts for address in await _addresses(front)}
            for address in found.keys() - self._announcers.keys():
                self._announcers[address] = self._announcer(address, found[address])
                self._announcers[address].start()
            for address in self._announcers.keys() - found.keys():
                if not self._announcers[address].is_connected:
                    await self._announcers.pop(address).stop()
            self._choose_counter()
            await asyncio.sleep(LOOK_S)

    def _announcer(self, address: Address, front: FrontAddress) -> Announcer:
        def describe() -> Announcement:
            return self._describe().model_copy(update={"token": front.token, "is_counted_here": address == self._counted_at})

        return Announcer(FrontAddress(host=address[0], port=address[1], token=front.token), describe, self._part)

    def _choose_counter(self) -> None:
        connected = [address for address, announcer in self._announcers.items() if announcer.is_connected]
        chosen = min(connected, default=None)
        if chosen != self._counted_at:
            self._counted_at = chosen
            self.update()


async def _addresses(front: FrontAddress) -> set[Address]:
    """The addresses that the front's name stands for now; none where it cannot be looked up."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(front.host, front.port, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {(str(address[0]), int(address[1])) for *_, address in found}
