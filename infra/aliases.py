"""The aliases of a registered model, moved together though MLflow can only write them one by one.

- `challenger` is the newest candidate, `champion` is what is served, `previous` is what `champion` was before: the way back.
- A move first writes down, as one tag of the registered model, what it is about to do; then `previous`; then `champion`, which is the
  moment at which the move has happened; then the note on the version; then it removes the tag.
- `read` takes the tag into account, so it gives the aliases of before or of after, never a mixture, wherever a move was cut off.
  Who looks at MLflow itself may see `previous` equal to `champion` for that long, but never `champion` moved and its old version lost.
- The next move, or `settle`, completes or undoes what was cut off. Only a holder of the lease writes (infra/lease.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
MOVE_TAG = "slipway.move"


class Move(Config):
    """What a move of `champion` is about to do; lies in the tag until it is done."""

    champion_from: str | None
    champion_to: str
    previous_from: str | None
    note: dict[str, str] = Field(default_factory=dict)
    """Tags for the version that becomes champion."""
    id: str = Field(default_factory=lambda: uuid4().hex)
    """Tells this move from any other."""


@dataclass(frozen=True)
class _Stored:
    """What MLflow holds now."""

    aliases: Mapping[str, str]
    move: Move | None


def read(mlflow: MlflowClient, name: str) -> dict[str, str]:
    """Version by alias, all of one moment. Raises RegistryError when the name is not there."""
    before, after = None, _stored(mlflow, name)
    while after != before:  # one request may read the tag before a move and the aliases after it; two alike did not
        before, after = after, _stored(mlflow, name)
    return _seen(after)


def move(mlflow: MlflowClient, name: str, version: str, note: Mapping[str, str], still_mine: Callable[[], None]) -> None:
    """Points `champion` at the version and `previous` at what `champion` was; nothing where it is champion already.

    `still_mine` is called right before the writes that count; it raises where the lease was lost.
    """
    settle(mlflow, name)
    aliases = _stored(mlflow, name).aliases
    if aliases.get(CHAMPION) == version:
        return
    planned = Move(champion_from=aliases.get(CHAMPION), champion_to=version, previous_from=aliases.get(PREVIOUS), note=dict(note))
    still_mine()
    mlflow.set_registered_model_tag(name, MOVE_TAG, planned.model_dump_json())
    if planned.champion_from is not None:
        mlflow.set_registered_model_alias(name, PREVIOUS, planned.champion_from)
    still_mine()
    mlflow.set_registered_model_alias(name, CHAMPION, version)
    _finish(mlflow, name, planned)


def settle(mlflow: MlflowClient, name: str) -> None:
    """Completes or undoes a move that was cut off; the caller holds the lease."""
    stored = _stored(mlflow, name)
    if stored.move is None:
        return
    if _happened(stored):
        _finish(mlflow, name, stored.move)
        return
    if stored.move.previous_from is None:
        with _absent_is_fine():
            mlflow.delete_registered_model_alias(name, PREVIOUS)
    else:
        mlflow.set_registered_model_alias(name, PREVIOUS, stored.move.previous_from)
    _forget(mlflow, name)


def _finish(mlflow: MlflowClient, name: str, done: Move) -> None:
    for key, value in done.note.items():
        mlflow.set_model_version_tag(name, done.champion_to, key, value)
    _forget(mlflow, name)


def _forget(mlflow: MlflowClient, name: str) -> None:
    with _absent_is_fine():
        mlflow.delete_registered_model_tag(name, MOVE_TAG)


def _happened(stored: _Stored) -> bool:
    return stored.move is not None and stored.aliases.get(CHAMPION) == stored.move.champion_to


def _seen(stored: _Stored) -> dict[str, str]:
    """The aliases as they were before the move that is under way, or as they are after it."""
    aliases = dict(stored.aliases)
    if stored.move is None:
        return aliases
    previous = stored.move.champion_from or stored.move.previous_from if _happened(stored) else stored.move.previous_from
    if previous is None:
        aliases.pop(PREVIOUS, None)
    else:
        aliases[PREVIOUS] = previous
    return aliases


def _stored(mlflow: MlflowClient, name: str) -> _Stored:
    from mlflow.exceptions import MlflowException

    try:
        model = mlflow.get_registered_model(name)
    except MlflowException as error:
        raise RegistryError(f"{name}: not in the registry ({error.message}). `slipway status --registered` lists what is.") from error
    text = model.tags.get(MOVE_TAG)
    try:
        planned = None if text is None else Move.model_validate_json(text)
    except ValidationError as error:
        raise RegistryError(
            f"{name}: its tag {MOVE_TAG} holds {text!r}, which is no move of aliases. Look at the aliases in MLflow, then remove the tag."
        ) from error
    return _Stored({alias: str(version) for alias, version in model.aliases.items()}, planned)


@contextlib.contextmanager
def _absent_is_fine() -> Iterator[None]:
    """A removal that MLflow's client sent twice finds nothing the second time."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
