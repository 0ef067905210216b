"""What a program can say of itself."""

from __future__ import annotations

import subprocess
import sys

from infra.process import peak_rss_bytes

LARGE = """
import os, sys
held = bytearray(600 << 20)
pid = os.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-c", "from infra.process import peak_rss_bytes; print(peak_rss_bytes())"])
os.waitpid(pid, 0)
"""


def test_peak_memory_is_a_process_s_own_and_not_its_parent_s() -> None:
    """As `ru_maxrss` has it, what the parent held before counts too."""
    found = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout
    assert 1 << 20 < int(found) < 300 << 20


def test_peak_memory_stays_when_memory_is_freed() -> None:
    before = peak_rss_bytes()
    held = bytearray(b"x") * (before + (64 << 20))
    del held
    assert peak_rss_bytes() > before
