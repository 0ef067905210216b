"""Loaded by every process of a Ray of our own, before it is given anything to do (`training/cluster.py` tells Ray so).

Such a Ray starts, at once, a process for each worker and two more, for Ray Train's controller and for the actor that its workers meet at.
Ray hands out first the processes that were ready first, so the last ones will be the workers: they load torch and transformers meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

SLOTS_VARIABLE = "SLIPWAY_PRELOAD_SLOTS"
NUM_OTHERS = 2
HIDDEN = "sklearn"


def make_slots(folder: Path, num_workers: int) -> None:
    """Leaves a file in `folder` for each process that is about to start, and tells those processes of it."""
    for number in range(NUM_OTHERS + num_workers):
        (folder / f"{number:05}").touch()
    os.environ[SLOTS_VARIABLE] = str(folder)


def take_slot() -> bool:
    """Whether this process is so late that it will be a worker."""
    for slot in sorted(Path(os.environ[SLOTS_VARIABLE]).glob("*")):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            slot.unlink()
            return int(slot.name) >= NUM_OTHERS
    return False


def keep_environments_alike() -> None:
    """Makes Ray Train send no environment variables to its actors: Ray gives the processes that are ready only to actors that want none.

    Nothing is lost, since the processes of this machine have inherited them.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.clear()


def load_trainer() -> ModuleType:
    """The worker's module. scikit-learn, half a second which transformers loads for one function that is never called, is kept out."""
    is_new = HIDDEN not in sys.modules
    if is_new:
        sys.modules[HIDDEN] = None  # type: ignore[assignment]  # the import system's own sign for a package that is not there
    try:
        return importlib.import_module("training.worker")
    finally:
        if is_new:
            del sys.modules[HIDDEN]


if os.environ.get(SLOTS_VARIABLE):
    keep_environments_alike()
    if take_slot():
        load_trainer()
