"""Loaded by every process of a Ray of our own, before it is given anything to do (`training/cluster.py` tells Ray so).

Such a Ray starts, at once, a process for each worker and two more, for Ray Train's controller and for the actor that its workers meet at.
Ray hands out first the processes that were ready first, so the last ones will be the workers: they load torch and transformers meanwhile.
Where a worker is asked for before one of them is ready, Ray starts yet another process, which lets them go first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType

SLOTS_VARIABLE = "SLIPWAY_PRELOAD_SLOTS"
SLOT_PATTERN = "[0-9]" * 5
LOADING = ".loading"
LOADING_TIMEOUT_S = 20.0  # the file of a process that was killed stays
NUM_OTHERS = 2
HIDDEN = ("scipy", "sklearn")  # 0.6 and 0.5 s, which transformers loads for functions that are never called


def make_slots(folder: Path, num_workers: int) -> None:
    """Leaves a file in `folder` for each process that is about to start, and tells those processes of it."""
    for number in range(NUM_OTHERS + num_workers):
        (folder / f"{number:05}").touch()
    os.environ[SLOTS_VARIABLE] = str(folder)


def take_slot(folder: Path) -> int | None:
    """How many processes came before this one; None where it was not expected."""
    for slot in sorted(folder.glob(SLOT_PATTERN)):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            slot.rename(slot.with_suffix(LOADING))
            return int(slot.name)
    return None


def preload(folder: Path) -> None:
    """Loads the trainer where this process will be a worker; waits for those that do where it was not expected."""
    slot = take_slot(folder)
    if slot is not None:
        try:
            if slot >= NUM_OTHERS:
                load_trainer()
        finally:
            (folder / f"{slot:05}{LOADING}").unlink(missing_ok=True)
    deadline_s = time.monotonic() + LOADING_TIMEOUT_S
    while slot is None and any(folder.glob(f"*{LOADING}")) and time.monotonic() < deadline_s:
        time.sleep(0.05)


def keep_environments_alike() -> None:
    """Makes Ray Train send no environment variables to its actors: Ray gives the processes that are ready only to actors that want none.

    Nothing is lost, since the processes of this machine have inherited them.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.clear()


def load_trainer() -> ModuleType:
    """The worker's module, loaded without what is hidden from it; after that everything can be imported again."""
    hidden = [name for name in HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is the import system's own sign for a package not there
    try:
        return importlib.import_module("training.worker")
    finally:
        for name in hidden:
            del sys.modules[name]


if os.environ.get(SLOTS_VARIABLE):
    keep_environments_alike()
    preload(Path(os.environ[SLOTS_VARIABLE]))
