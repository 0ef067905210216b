"""How a step's program is started and how it answers.

Every program of a stack is `python -m <module> --config FILE`: the same command in a subprocess on a laptop, as a Ray job and in a pod.
The file holds one `Job`; the program writes below `job.output_dir`, its manifest last, appends progress to `job.progress_file`, and on
a known error leaves `FILE.error.json` beside the config, so the driver can show the message and not a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from infra.config import Config, load
from infra.errors import BY_NAME, EXIT_DONE, EXIT_INTERRUPTED, SlipwayError, TransientError
from infra.files import write_json_atomic
from infra.provenance import Provenance

DISTRIBUTION = "slipway-ml"
PARENT_POLL_S = 0.5
DRAFT_POLL_S = 0.02
PARENT_GRACE_S = 15.0


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident.

    Not `ru_maxrss` where Linux tells better: that starts with what the process that started this one had, 1.66 GB under all our tests.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TrackingTarget(Config):
    """The MLflow run that this program reports to; the driver made it."""

    uri: str
    run_id: str
    unsent_file: Path | None = None
    """Where figures wait while the store is away; absent means in memory only."""
    patience_s: float = 120.0
    """How long the end of the program waits for a store that is away before it leaves figures in the file."""


class Remote(Config):
    """Where a program that runs for a driver elsewhere finds its order, and puts what it makes (`infra/orders.py`)."""

    store: str
    """URL of the artifact store."""
    order: str
    """Name of the order in it."""


class Job(Config):
    """What every program is told; each adds its own fields."""

    output_dir: Path
    """Empty or half-written folder of this program; what it holds from a killed attempt may be used to resume."""
    progress_file: Path | None = None
    """JSON lines, one a report; see `Progress`."""
    tracking: TrackingTarget | None = None
    provenance: Provenance = Provenance()
    remote: Remote | None = None
    """Set by `infra.remote`, for programs that themselves use other machines; absent where the driver is on this one."""


J = TypeVar("J", bound=Config)


class Progress:
    """Appends `{"done", "total", "unit", ...}` lines to a job's progress file; does nothing where the job names none."""

    def __init__(self, path: Path | None, unit: str) -> None:
        self._path = path
        self._unit = unit

    def report(self, done: float, total: float, **figures: float | str) -> None:
        """One line: `done` of `total` in the unit named at the start, with figures to show beside it."""
        if self._path is None:
            return
        line = json.dumps({"time_s": time.time(), "done": done, "total": total, "unit": self._unit, **figures})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def error_file(config_file: Path) -> Path:
    """Where a program leaves its known error."""
    return config_file.with_name(config_file.name + ".error.json")


def read_error(config_file: Path) -> SlipwayError | None:
    """The known error that the program with this config ended by, if it did."""
    path = error_file(config_file)
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return BY_NAME.get(data["type"], SlipwayError)(data["message"])


def run_program(
    model: type[J],
    program: Callable[[J], None],
    arguments: list[str] | None = None,
    prepared: Callable[[J], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
) -> NoReturn:
    """Runs `program` on the job named by `--config FILE`, changed by each `--set a.b=value`, and exits with the code its outcome has.

    With `--draft FILE`, the job as far as it is known yet, what it needs is `prepared` while the config is still awaited.
    """
    parser = argparse.ArgumentParser(description=program.__doc__)
    parser.add_argument("--config", type=Path, required=True, help=f"JSON or YAML file that holds one {model.__name__}")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="a value in place of the file's; may be repeated")
    parser.add_argument("--draft", type=Path, help=f"{model.__name__} to prepare for until the file of --config is there")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and stop")
    parser.add_argument("--parent-pid", type=int, help="stop when this process, which started us, is gone")
    options = parser.parse_args(arguments)
    config_file = options.config
    signal.signal(signal.SIGTERM, _interrupt)
    if options.parent_pid:
        threading.Thread(target=_stop_without, args=(options.parent_pid,), name="parent-watch", daemon=True).start()
    try:
        with disk_full_as_known_error(), prepared(load(model, options.draft)) if options.draft else contextlib.nullcontext():
            while options.draft and not config_file.is_file():
                time.sleep(DRAFT_POLL_S)
            program(load(model, config_file, options.set))
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        with contextlib.suppress(OSError):  # the disk may be full; the exit code still tells
            write_json_atomic(error_file(config_file), {"type": type(error).__name__, "message": error.message})
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_DONE)


@contextlib.contextmanager
def disk_full_as_known_error() -> Iterator[None]:
    """Raises TransientError in place of the OSError of a full disk: freeing some space is all that is needed."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise TransientError(
            f"the disk is full ({error.filename or 'while writing'}). Free some space; the same command resumes."
        ) from error


class _ShowVersion(argparse.Action):
    """Looks the version up only where it is asked for: a program may run from a folder, of which nothing is installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
        parser.exit()


def _stop_without(parent_pid: int) -> None:
    """Stops this process when its parent is gone: a driver killed by SIGKILL must leave nothing that writes to its folders."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PARENT_GRACE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt
