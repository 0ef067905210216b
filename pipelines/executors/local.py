"""Runs a step's program as a subprocess of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from infra.child import POLL_S, STOP_TIMEOUT_S, start_module, stop
from infra.errors import SlipwayError, TransientError
from infra.files import write_json_atomic
from infra.process import Job, error_file, read_error
from infra.travel import fetch_from_hub, hub_sources

__all__ = ["POLL_S", "STOP_TIMEOUT_S", "LocalExecutor", "Started", "failure", "run_to_end", "start", "started_ahead", "stop"]

LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Started:
    """A program that prepares for its job, and begins when `config_file` is there."""

    process: subprocess.Popen[bytes]
    config_file: Path


@dataclass(frozen=True)
class LocalExecutor:
    """Programs as subprocesses of this machine."""

    ahead: Started | None = None
    """The program to go on with, where it was started ahead."""

    def run_to_end(self, module: str, job: Job, config_file: Path, log_file: Path, on_tick: Callable[[], None]) -> None:
        """As the function of that name says."""
        run_to_end(module, job, config_file, log_file, on_tick, self.ahead)


def start(module: str, job: Job, config_file: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts `python -m module --config config_file` in a session of its own, its output in `log`."""
    write_json_atomic(config_file, job.model_dump(mode="json"))
    error_file(config_file).unlink(missing_ok=True)
    return start_module(module, ["--config", str(config_file)], log)


@contextlib.contextmanager
def started_ahead(module: str, draft: Job, folder: Path, log_file: Path) -> Iterator[Started]:
    """Starts the program on the job as far as it is known, in files of its own in `folder`; stops it after the block."""
    draft_file = folder / f"{module}-{os.getpid()}.draft.json"
    config_file = draft_file.with_name(f"{module}-{os.getpid()}.json")
    write_json_atomic(draft_file, draft.model_dump(mode="json"))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        process = start_module(module, ["--config", str(config_file), "--draft", str(draft_file)], log)
    try:
        yield Started(process, config_file)
    finally:
        stop(process)


def run_to_end(module: str, job: Job, config_file: Path, log_file: Path, on_tick: Callable[[], None], ahead: Started | None = None) -> None:
    """Runs the program, or goes on with the one that was started ahead, to its end, calling `on_tick` meanwhile.

    Raises the known error that the program left, or SlipwayError with the end of its log. Stops the program if it is itself interrupted.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    fetch_from_hub(hub_sources(job))
    with log_file.open("ab") as log:
        if ahead is None:
            process = start(module, job, config_file, log)
        else:
            process, config_file = ahead.process, ahead.config_file
            write_json_atomic(config_file, job.model_dump(mode="json"))
        try:
            while process.poll() is None:
                on_tick()
                time.sleep(POLL_S)
        finally:
            stop(process)
    on_tick()
    if process.returncode != 0:
        raise failure(module, process.returncode, config_file, log_file)


def failure(module: str, returncode: int, config_file: Path, log_file: Path) -> SlipwayError:
    """The error by which the program ended: its own where it left one."""
    known = read_error(config_file)
    if known is not None:
        return known
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return TransientError(f"{module} was ended by {name}. Its log is {log_file}. Run the same command again to resume.")
    tail = "\n".join(_tail(log_file))
    return SlipwayError(f"{module} ended with exit code {returncode}. The end of its log {log_file}:\n{tail}")


def _tail(path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return iter(lines[-LOG_TAIL_LINES:])
