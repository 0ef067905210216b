"""Which model is deployed, and where its pods get it: always by digest, so that every replica serves the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from infra import registry, tracking, uploads
from infra.artifact_store import ARTIFACTS, open_store
from infra.contracts import SEAL_DIR, Manifest, read_manifest
from infra.errors import ConfigError
from infra.settings import Settings
from pipelines.target import version_folder

NEEDED = (
    "Set SLIPWAY_STORE to a URL that the cluster reaches too (s3://bucket/prefix), or MLFLOW_TRACKING_URI to a server's, "
    "or name the model in a values file under config.model."
)


@dataclass(frozen=True)
class Registered:
    """A registered version as pods get it."""

    source: dict[str, Any]
    """`config.model` of the serving chart."""
    weight_format: str | None
    """Absent: 16-bit weights."""


def registered(name: str, wanted: str, settings: Settings, is_trial: bool = False) -> Registered:
    """A version (a number) or alias of a registered model, pushed to the store where one is set; a trial pushes nothing.

    Raises RegistryError where there is no such version, ConfigError where no pod could reach it.
    """
    mlflow = tracking.client(settings.tracking_uri)
    version = registry.lookup(mlflow, name, wanted) if wanted.isdigit() else registry.resolve(mlflow, name, wanted)
    if settings.store:
        is_here = version.is_local and version.folder.is_dir()
        source = _in_store(version.digest, lambda: version_folder(mlflow, version, settings), settings, is_here, is_trial)
    elif version.is_local or not settings.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError(f"{name} version {version.version}: its files lie where no pod reaches them ({version.source}). {NEEDED}")
    else:
        source = {"type": "registry", "name": name, "version": version.version, "digest": version.digest}
    manifest = _manifest(mlflow, version, settings)
    return Registered(source, manifest.weight_format if manifest else None)


def folder_source(folder: Path, settings: Settings, is_trial: bool = False) -> dict[str, Any]:
    """A source for an artifact's folder of this machine (an adapter, a pool's model), pushed to the store; a trial pushes nothing.

    Raises ConfigError where there is no store.
    """
    manifest = read_manifest(folder)
    if not settings.store:
        raise ConfigError(f"{folder}: a folder of this machine, which no pod reaches. {NEEDED}")
    return _in_store(manifest.digest, lambda: folder, settings, is_here=True, is_trial=is_trial)


def _in_store(digest: str, folder: Callable[[], Path], settings: Settings, is_here: bool, is_trial: bool) -> dict[str, Any]:
    """A source in the store, where the artifact is pushed unless it is there; what is here goes up again for a seal made since."""
    store = open_store(str(settings.store))
    name = store.find(digest)
    is_sealed = name is not None and bool(store.place.names(f"{ARTIFACTS}/{name}/{SEAL_DIR}"))
    if not is_trial and (is_here or not is_sealed):
        store.push(folder())
    return {"type": "store", "digest": digest}


def _manifest(mlflow: MlflowClient, version: registry.RegisteredVersion, settings: Settings) -> Manifest | None:
    """What the version is, read where it lies: here, in the store or in its run. Raises ArtifactError where it lies nowhere."""
    if version.is_local and version.folder.is_dir():
        return read_manifest(version.folder)
    store = open_store(settings.store) if settings.store else None
    name = store.find(version.digest) if store else None
    if store is not None and name is not None:
        return store.manifest(name)
    return read_manifest(version.folder) if version.is_local else uploads.manifest_in(mlflow, version.run_id)
