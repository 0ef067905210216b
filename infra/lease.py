"""One writer at a time for the aliases of a registered model, on whichever machines the writers are.

- The lease is a registered model of a reserved name: every MLflow store refuses to make a name twice, so making it is taking it, by one
  request that either happens or does not, on SQLite, on PostgreSQL and behind a tracking server alike.
- It carries who holds it. A holder that was killed is found out at once on its own machine, and after `LEASE_S` from any other.
- An old lease is put aside by renaming it after its token; a second one who tries finds that name taken.
- What is not guaranteed, as MLflow writes an alias without comparing: a holder that is stopped for longer than `LEASE_S` between its
  last look at the lease and the one write after it would still write. Machines' clocks have to agree to well within `LEASE_S`.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
from pydantic import Field

from infra.config import Config
from infra.errors import TransientError

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

LEASE_S = 120.0
HOLDER_TAG = "slipway.holder"
PREFIX = "slipway-lease."
ASIDE = ".aside."
MAX_TRIES = 10


def who_am_i() -> str:
    """`user@host`, for tags and messages."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number and no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _process_space() -> str:
    """Tells where a process number means something: the host, and the container on it."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink() if space.is_symlink() else ''}".strip()


class Holder(Config):
    """Who holds a lease."""

    by: str = Field(default_factory=who_am_i)
    space: str = Field(default_factory=_process_space)
    pid: int = Field(default_factory=os.getpid)
    started_s: float = Field(default_factory=lambda: psutil.Process().create_time())
    since_s: float = Field(default_factory=time.time)
    token: str = Field(default_factory=lambda: uuid4().hex)

    def is_gone(self) -> bool:
        """Whether it was killed, or has had its time."""
        if time.time() - self.since_s > LEASE_S:
            return True
        if self.space != _process_space():
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started_s) > 1.0)
        except psutil.NoSuchProcess:
            return True


@contextmanager
def held(mlflow: MlflowClient, name: str) -> Iterator[Callable[[], None]]:
    """Holds the lease of a model's aliases; gives a function that raises TransientError where it was lost.

    Raises TransientError, naming the holder, when someone else has it.
    """
    lease, mine = PREFIX + name, Holder()
    deadline_s = time.monotonic() + LEASE_S / 2
    _take(mlflow, lease, name, mine)

    def still_mine() -> None:
        found = _holder(mlflow, lease)
        if found is None or found.token != mine.token or time.monotonic() > deadline_s:
            raise TransientError(f"{name}: the store was too slow, and the lease on its aliases ran out. Nothing moved; run it again.")

    try:
        yield still_mine
    finally:
        found = _holder(mlflow, lease)
        if found is not None and found.token == mine.token:
            _remove(mlflow, lease)
        for aside in mlflow.search_registered_models(f"name LIKE '{lease}{ASIDE}%'"):
            _remove(mlflow, aside.name)


def _take(mlflow: MlflowClient, lease: str, name: str, mine: Holder) -> None:
    from mlflow.exceptions import MlflowException

    found = None
    for _ in range(MAX_TRIES):
        try:
            mlflow.create_registered_model(lease, tags={HOLDER_TAG: mine.model_dump_json()})
            return
        except MlflowException as error:
            if not _is(error, "RESOURCE_ALREADY_EXISTS"):
                raise
        found = _holder(mlflow, lease)
        if found is None:
            continue
        if found.token == mine.token:  # the answer to our own request was lost, and MLflow's client asked again
            return
        if not found.is_gone():
            break
        _put_aside(mlflow, lease, found)
    since = "" if found is None else f" by {found.by}, process {found.pid}, for {time.time() - found.since_s:.0f} s"
    raise TransientError(f"{name}: its aliases are being moved{since}. One at a time: look at `slipway status {name}`, then run it again.")


def _put_aside(mlflow: MlflowClient, lease: str, old: Holder) -> None:
    """Frees the lease of a holder that is gone; does nothing where someone else just did."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.rename_registered_model(lease, f"{lease}{ASIDE}{old.token}")
    except MlflowException as error:
        if not _is(error, "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise


def _holder(mlflow: MlflowClient, lease: str) -> Holder | None:
    from mlflow.exceptions import MlflowException

    try:
        return Holder.model_validate_json(mlflow.get_registered_model(lease).tags[HOLDER_TAG])
    except MlflowException as error:
        if not _is(error, "RESOURCE_DOES_NOT_EXIST"):
            raise
        return None


def _remove(mlflow: MlflowClient, lease: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.delete_registered_model(lease)
    except MlflowException as error:
        if not _is(error, "RESOURCE_DOES_NOT_EXIST"):
            raise


def _is(error: MlflowException, *codes: str) -> bool:
    """Whether MLflow's error is of one of these codes."""
    return error.error_code in codes
