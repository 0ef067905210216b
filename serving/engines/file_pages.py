"""Memory that a mapped file takes in a process: given back where the library has made its own copy of what it read."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

MADV_DONTNEED = 4  # Linux, madvise(2): later reads find the file's content again


def release_file_pages(path: Path) -> int:
    """Gives back this process's pages of a file that it has mapped to read, and returns how many bytes of address space that concerned.

    The system keeps the file cached, and a page that is read after all comes back from there. Elsewhere than on Linux nothing happens.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    released = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, _, _, _, *name = line.split(maxsplit=5)
        if name != [str(path.resolve())] or "w" in mode:  # what was written would be lost
            continue
        start, end = (int(part, 16) for part in place.split("-"))
        if libc.madvise(start, end - start, MADV_DONTNEED) == 0:
            released += end - start
    return released
