"""Memory that a process no longer needs, given back.

- What its start alone needed: the mapped files of a model, of which a library has made its own copy, and of the libraries' code that read
  and compiled it. Of 219 MB in an OpenVINO process with the 135M model answers touch some 50 again, where the system's cache has them in
  small pages. Linux 6.18 maps large ones whole: 113 of the model file's 135 MB for eight bytes of each weight, which OpenVINO reads to
  tell it from others whenever it chooses a kernel, instead of 24. That is cache, which goes where memory is short, but counts as resident;
  giving it back every five seconds is of no use, for the next step maps it again.
- What the allocator keeps of freed memory: 13 MB there after the start, and as much again while it answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.repeated import repeated

MADV_DONTNEED = 4  # Linux, madvise(2): later reads find the file's content again


def release_start_memory() -> None:
    """Gives back both; elsewhere than on Linux with glibc nothing happens."""
    if sys.platform == "linux":
        release_file_pages()
        release_freed_heap()


def release_freed_heap() -> None:
    """Gives back what the allocator keeps of freed memory, in 1 to 3 ms with 300 MB in use; only glibc's has a call for it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def giving_back_freed_heap(every_s: float = 5.0) -> contextlib.AbstractContextManager[None]:
    """Within the block, freed memory goes back all the while: as little is held as by an allocator that keeps none, which is slower."""
    return repeated(release_freed_heap, every_s, "freed-heap")


@contextlib.contextmanager
def giving_back_file_pages(every_s: float = 1.0) -> Iterator[None]:
    """Within the block, pages of mapped files go back all the while: of a model that is read and copied piece by piece one copy is held."""
    with repeated(release_file_pages, every_s, "file-pages") if sys.platform == "linux" else contextlib.nullcontext():
        yield


def release_file_pages() -> int:
    """Gives back this process's pages of files that it has mapped to read, and returns how many bytes of address space that concerned.

    The system keeps the files cached, and a page that is read after all comes back from there. What was ever written through a mapping of
    its own (the addresses that a linker fills in, say) is not in the file and stays. For Linux.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(end - start for start, end in list(_unwritten_files()) if libc.madvise(start, end - start, MADV_DONTNEED) == 0)


def _unwritten_files() -> Iterator[tuple[int, int]]:
    """First address and the one after the last of each mapping of a file that cannot be written and never was."""
    place = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split(maxsplit=5)
        if not first.endswith(":"):  # the first line of a mapping: addresses, mode, offset, device, inode, name
            is_read_only_file = len(others) == 5 and others[4].startswith("/") and "w" not in others[0]
            place = first if is_read_only_file else None
        elif first == "Anonymous:" and place is not None and others[0] == "0":
            start, _, end = place.partition("-")
            yield int(start, 16), int(end, 16)
