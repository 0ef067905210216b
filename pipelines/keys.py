"""`slipway keys`: API keys of served models."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infra import api_keys
from infra.settings import load_settings


def add(name: str, file: Path | None, weight: float, top_priority: int, as_json: bool) -> None:
    """Makes a key and prints it."""
    path = _path(file)
    key, secret = api_keys.add(path, name, weight, top_priority)
    if as_json:
        print(json.dumps({"file": str(path), "id": key.id, "name": key.name, "key": secret}))
        return
    print(secret)
    Console(stderr=True).print(f"{key.id} {key.name}, in {path}. This is the only time that it is shown.", soft_wrap=True)


def show(file: Path | None, as_json: bool) -> None:
    """Prints what is known of the keys."""
    keys = api_keys.read(_path(file))
    if as_json:
        print(json.dumps({"keys": [key.model_dump(exclude={"sha256"}) for key in keys]}))
        return
    table = Table("id", "name", "created", "weight", "top priority", box=None, pad_edge=False)
    for key in keys:
        table.add_row(key.id, key.name, key.created, f"{key.weight:g}", str(key.top_priority))
    Console().print(table if keys else "No key is valid: `slipway keys add NAME` makes one.")


def revoke(name: str, file: Path | None) -> None:
    """Takes a key out of the file."""
    path = _path(file)
    key = api_keys.revoke(path, name)
    Console(stderr=True).print(f"{key.id} {key.name} is no longer valid, in {path}", soft_wrap=True)


def _path(file: Path | None) -> Path:
    return (file or load_settings().api_keys_file).absolute()
