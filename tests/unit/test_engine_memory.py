"""Pages of a mapped file and freed memory are given back, and what is read afterwards is still there."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from serving.engines.memory import giving_back_file_pages, giving_back_freed_heap, release_file_pages

SIZE_BYTES = 8 << 20
BLOCK_BYTES = 1 << 16  # smaller than what glibc maps by itself
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise as Linux has it")


def test_released_pages_leave_the_process_and_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * (SIZE_BYTES // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        before = resident_bytes(path)
        assert release_file_pages() >= SIZE_BYTES
        assert before == SIZE_BYTES
        assert resident_bytes(path) == 0
        assert mapped[:256] == bytes(range(256))


@pytest.mark.parametrize("becomes_read_only", [False, True])
def test_pages_that_were_written_stay(becomes_read_only: bool, tmp_path: Path) -> None:
    """Read-only is how a linker leaves the addresses that it has filled in: without them the next call into a library ends the process."""
    path = tmp_path / "library.so"
    path.write_bytes(bytes(SIZE_BYTES))
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 7
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if becomes_read_only:
            assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(SIZE_BYTES), mmap.PROT_READ) == 0
        release_file_pages()
        assert mapped[0] == 7


def test_pages_read_within_the_block_go_back_while_it_lasts(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(SIZE_BYTES))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        num_threads = threading.active_count()
        with giving_back_file_pages(every_s=0.01):
            assert sum(mapped[::4096]) == 0
            deadline_s = time.monotonic() + 30
            while resident_bytes(path):
                assert time.monotonic() < deadline_s, "the pages stay"
                time.sleep(0.01)
        assert threading.active_count() == num_threads


def test_memory_freed_within_the_block_goes_back_while_it_lasts() -> None:
    """Blocks too small to be mapped by themselves, the last of which stays in use: glibc alone would keep those below it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    blocks = [libc.malloc(BLOCK_BYTES) for _ in range(SIZE_BYTES // BLOCK_BYTES)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks[:-1]:
        libc.free(block)
    kept = psutil.Process().memory_info().rss
    with giving_back_freed_heap(every_s=0.01):
        deadline_s = time.monotonic() + 30
        while psutil.Process().memory_info().rss > kept - SIZE_BYTES // 2:
            assert time.monotonic() < deadline_s, "freed memory stays"
            time.sleep(0.01)
    assert ctypes.string_at(blocks[-1], BLOCK_BYTES) == b"\1" * BLOCK_BYTES
    libc.free(blocks[-1])


def resident_bytes(path: Path) -> int:
    """This process's pages of a file."""
    found, is_mapping = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper() and "-" in line.split()[0]:
            is_mapping = line.endswith(str(path))
        elif is_mapping and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found
