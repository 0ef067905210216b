"""What `slipway promote` and `slipway rollback` do."""

from __future__ import annotations

import json
from pathlib import Path

from infra import tracking
from infra.errors import ConfigError
from infra.registry import CHAMPION, RegisteredVersion
from infra.settings import load_settings
from pipelines import promotion
from pipelines.spec import load_spec
from pipelines.target import SPEC_SUFFIXES


def promote(model: str, number: str | None, force: bool, reason: str | None, as_json: bool) -> None:
    """`slipway promote SPEC|NAME [VERSION]`. Raises ConfigError on --force without a reason, or a reason without it."""
    if reason is not None and not force:
        raise ConfigError("--reason is kept with a forced promotion only. Add --force, or leave it out.")
    forced_because = promotion.checked_reason(reason or "") if force else None
    mlflow = tracking.client(load_settings().tracking_uri)
    _show(promotion.promote(mlflow, _name(model), number, forced_because), as_json)


def rollback(model: str, as_json: bool) -> None:
    """`slipway rollback SPEC|NAME`."""
    _show(promotion.rollback(tracking.client(load_settings().tracking_uri), _name(model)), as_json)


def _name(model: str) -> str:
    return load_spec(Path(model), []).name if Path(model).suffix in SPEC_SUFFIXES else model


def _show(version: RegisteredVersion, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"name": version.name, "version": version.version, "aliases": list(version.aliases), "digest": version.digest}))
    else:
        print(f"{version.name} version {version.version} is @{CHAMPION}")
