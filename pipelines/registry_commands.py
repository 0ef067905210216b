"""What `slipway promote` and `slipway rollback` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from infra import lease, tracking, uploads
from infra.errors import ConfigError
from infra.registry import CHAMPION, RegisteredVersion
from infra.settings import Settings, load_settings
from pipelines import promotion, sealing
from pipelines.spec import load_spec
from pipelines.target import SPEC_SUFFIXES, version_folder

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def promote(model: str, number: str | None, force: bool, reason: str | None, as_json: bool) -> None:
    """`slipway promote SPEC|NAME [VERSION]`. Raises ConfigError on --force without a reason, or a reason without it."""
    if reason is not None and not force:
        raise ConfigError("--reason is kept with a forced promotion only. Add --force, or leave it out.")
    forced_because = promotion.checked_reason(reason or "") if force else None
    settings = load_settings()
    mlflow = tracking.client(settings.tracking_uri)
    version = promotion.candidate(mlflow, _name(model), number)
    if forced_because:
        _sign(mlflow, version, settings, forced_because)
    _show(promotion.promote(mlflow, version.name, version.version, forced_because), as_json)


def rollback(model: str, as_json: bool) -> None:
    """`slipway rollback SPEC|NAME`."""
    _show(promotion.rollback(tracking.client(load_settings().tracking_uri), _name(model)), as_json)


def _sign(mlflow: MlflowClient, version: RegisteredVersion, settings: Settings, reason: str) -> None:
    """Signs what no gate let pass, before it is champion: a server takes nothing that nobody vouches for."""
    folder = version_folder(mlflow, version, settings)
    sealing.seal_unless_sealed(settings, folder, {"name": version.name, "forced_by": lease.who_am_i(), "reason": reason})
    if not version.is_local:
        uploads.upload_beside(mlflow, version.run_id, folder, settings.staging_dir)


def _name(model: str) -> str:
    return load_spec(Path(model), []).name if Path(model).suffix in SPEC_SUFFIXES else model


def _show(version: RegisteredVersion, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"name": version.name, "version": version.version, "aliases": list(version.aliases), "digest": version.digest}))
    else:
        print(f"{version.name} version {version.version} is @{CHAMPION}")
