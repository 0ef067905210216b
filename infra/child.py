"""A program of ours as a child process: started in a session of its own, stopped with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

from infra.settings import child_environment

POLL_S = 0.1
STOP_TIMEOUT_S = 20.0
REPOSITORY = Path(__file__).resolve().parents[1]


def start_module(module: str, arguments: list[str], log: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Starts `python -m module ARGUMENTS`, its output in `log`; it stops by itself when this process is gone."""
    environment = child_environment(module)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    # A session of its own: Ctrl-C reaches the driver alone, which then stops the program in order.
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--parent-pid", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Asks the program to stop, then kills what is left of its session; nothing is left running."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    while left := _session(process.pid):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    process.wait()


def _session(leader_pid: int) -> list[int]:
    """The processes of a session that still run; Ray puts its workers into process groups of their own, so that the group is not all."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader_pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
