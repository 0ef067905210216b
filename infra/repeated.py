"""Something that is looked at again and again, beside what runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(look: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Calls `look` every so many seconds, on a thread of that name, while the block runs, and once more at its end."""
    ended = threading.Event()

    def look_on() -> None:
        while not ended.wait(every_s):
            look()

    thread = threading.Thread(target=look_on, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
