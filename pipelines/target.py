"""The model that a command names, and how it is to be served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from infra import registry, tracking, uploads
from infra.config import Config, apply_overrides, parse
from infra.contracts import MANIFEST_NAME, read_manifest
from infra.settings import Settings
from pipelines.spec import load_spec
from serving.config import BatchConfig, ServeConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SPEC_SUFFIXES = (".yaml", ".yml", ".json")


class ServingOptions(Config):
    """The part of a spec that can be said of a model without one, by `--set`."""

    serve: ServeConfig = Field(default_factory=ServeConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)


@dataclass(frozen=True)
class Target:
    """A model folder, and what was said about serving it."""

    name: str
    model_dir: Path
    serve: ServeConfig
    batch: BatchConfig
    label: str
    """What it is, for people."""


def find_target(model: str, overrides: list[str], settings: Settings) -> Target:
    """What a spec file, NAME@ALIAS or folder names. Raises ConfigError on a bad option, RegistryError or ArtifactError on no model."""
    path = Path(model)
    if path.suffix in SPEC_SUFFIXES:
        spec = load_spec(path, overrides)
        return _registered(spec.name, registry.CHAMPION, ServingOptions(serve=spec.serve, batch=spec.batch), settings)
    options = parse(ServingOptions, apply_overrides({}, overrides), "--set")
    if (path / MANIFEST_NAME).is_file() or len(path.parts) > 1:
        read_manifest(path)
        folder = path.absolute()
        return Target(folder.name, folder, options.serve, options.batch, str(folder))
    name, _, alias = model.partition("@")
    return _registered(name, alias or registry.CHAMPION, options, settings)


def _registered(name: str, alias: str, options: ServingOptions, settings: Settings) -> Target:
    mlflow = tracking.client(settings.tracking_uri)
    version = registry.resolve(mlflow, name, alias)
    folder = version_folder(mlflow, version, settings)
    aliases = ", ".join(f"@{item}" for item in version.aliases)
    return Target(name, folder, options.serve, options.batch, f"{name} version {version.version} ({aliases})")


def version_folder(mlflow: MlflowClient, version: registry.RegisteredVersion, settings: Settings) -> Path:
    """Where the version's model lies on this machine, fetched first where it does not. Raises ArtifactError or TransientError."""
    return version.folder if version.is_local else uploads.download(mlflow, version.run_id, version.digest, settings.artifacts_dir)
