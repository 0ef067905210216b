"""Model versions and their aliases in the MLflow registry.

- `challenger` is the newest candidate, `champion` is what is served, `previous` is what `champion` was before: the way back.
- A version points at an artifact folder and carries its content digest, so the same artifact is never registered twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from infra.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
DIGEST_TAG = "slipway.digest"
GATES_TAG = "slipway.gates"


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    folder: Path
    digest: str
    aliases: tuple[str, ...]
    run_id: str


def register(mlflow: MlflowClient, name: str, folder: Path, digest: str, run_id: str) -> RegisteredVersion:
    """The version of `name` that holds this artifact, made when there is none."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    for version in mlflow.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"):
        if _folder(version) == folder.absolute():
            return lookup(mlflow, name, version.version)
    created = mlflow.create_model_version(name, source=folder.absolute().as_uri(), run_id=run_id, tags={DIGEST_TAG: digest})
    return lookup(mlflow, name, created.version)


def lookup(mlflow: MlflowClient, name: str, version: str) -> RegisteredVersion:
    """A version by number. Raises RegistryError when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return _registered(mlflow.get_model_version(name, version))
    except MlflowException as error:
        raise RegistryError(f"{name} version {version}: not in the registry ({error.message}). `slipway status` lists what is.") from error


def resolve(mlflow: MlflowClient, name: str, alias: str = CHAMPION) -> RegisteredVersion:
    """The version an alias points at. Raises RegistryError when the name or the alias is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return _registered(mlflow.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        raise RegistryError(f"{name}@{alias}: not in the registry ({error.message}). `slipway status` lists names and aliases.") from error


def mark_challenger(mlflow: MlflowClient, version: RegisteredVersion, passed: bool) -> None:
    """Points `challenger` at the version and records whether its gates passed."""
    mlflow.set_registered_model_alias(version.name, CHALLENGER, version.version)
    mlflow.set_model_version_tag(version.name, version.version, GATES_TAG, "passed" if passed else "refused")


def promote(mlflow: MlflowClient, version: RegisteredVersion) -> RegisteredVersion:
    """Moves `champion` to the version, keeping the old one as `previous`; does nothing when it is champion already."""
    champion = _aliased(mlflow, version.name, CHAMPION)
    if champion is None or champion.version != version.version:
        if champion is not None:
            mlflow.set_registered_model_alias(version.name, PREVIOUS, champion.version)
        mlflow.set_registered_model_alias(version.name, CHAMPION, version.version)
    return lookup(mlflow, version.name, version.version)


def all_versions(mlflow: MlflowClient, name: str | None = None) -> list[RegisteredVersion]:
    """Every version of one model or of all, newest first."""
    models = [name] if name else [model.name for model in mlflow.search_registered_models()]
    versions = [found for model in models for found in mlflow.search_model_versions(f"name = '{model}'")]
    # A search leaves aliases out; the look-up has them.
    return sorted((lookup(mlflow, found.name, found.version) for found in versions), key=lambda item: (item.name, -int(item.version)))


def _aliased(mlflow: MlflowClient, name: str, alias: str) -> RegisteredVersion | None:
    try:
        return resolve(mlflow, name, alias)
    except RegistryError:
        return None


def _registered(version: ModelVersion) -> RegisteredVersion:
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),  # a number from some stores, a text from others
        folder=_folder(version),
        digest=version.tags.get(DIGEST_TAG, ""),
        aliases=tuple(version.aliases),
        run_id=version.run_id or "",
    )


def _folder(version: ModelVersion) -> Path:
    return Path(unquote(urlparse(version.source).path))
