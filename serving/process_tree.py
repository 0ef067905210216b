"""Keeps a hold on every process started below this one, so that none outlives it."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterable

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Makes this process the parent of grandchildren whose own parent ends, so that `end_children` still finds them. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(patience_s: float = 3.0) -> None:
    """Ends every process below this one: SIGTERM first, SIGKILL after `patience_s`; returns when none is left."""
    if alive := _children():
        _signal(alive, signal.SIGTERM)
        psutil.wait_procs(alive, timeout=patience_s)
    while alive := _children():
        _signal(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=1.0)


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.is_running()]


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
