"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all sources as they come; raises what the first source to fail raises. Closing it closes them all."""
    arrived: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    async def read(source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    arrived.put_nowait(item)
            arrived.put_nowait(None)
        except Exception as error:  # handed on to the reader, whatever it is
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(read(source)) for source in sources]
    try:
        num_running = len(tasks)
        while num_running:
            item = await arrived.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
