"""API keys: one JSON file of their digests, written by `slipway keys`, read by the server.

- A key is 32 random bytes, shown once and stored as its sha256. A slow hash would add nothing: it defends short secrets against guessing,
  and 2**256 keys cannot be guessed at any speed; it would cost every request some 100 ms.
- So the file holds nothing that lets anyone in, and may lie in a ConfigMap.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import ConfigError
from infra.files import write_json_atomic

PRIORITIES = (-100, 100)
KEY_PREFIX = "sk-slipway-"
KEY_BYTES = 32
MAX_KEY_CHARS = 512


class ApiKey(Config):
    """What is kept of one key."""

    id: str
    """Names the key in logs and commands."""
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    """Who uses it."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: str
    """UTC, ISO 8601."""
    weight: float = Field(1.0, gt=0, le=1000)
    """Share of a busy server beside the other keys' weights."""
    top_priority: int = Field(0, ge=PRIORITIES[0], le=PRIORITIES[1])
    """Smallest, so most urgent, `priority` that its requests may ask for."""


class KeyFile(Config):
    """The whole file."""

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def read(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file. Raises ConfigError when it is absent or not what `slipway keys` writes."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{path}: the API keys cannot be read ({error.strerror}). `slipway keys add NAME` makes the file.") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise ConfigError(f"{path}: not a file of API keys: {place}: {problem['msg']}. `slipway keys` writes such files.") from error


def add(path: Path, name: str, weight: float = 1.0, top_priority: int = 0) -> tuple[ApiKey, str]:
    """Adds a key to the file, which is made if absent; the record and the key itself, which is kept nowhere.

    Raises ConfigError when the name is taken or a value is out of its bounds.
    """
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        key = ApiKey(
            id=f"key-{secrets.token_hex(4)}", name=name, sha256=_digest(secret), created=created, weight=weight, top_priority=top_priority
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]} {problem['input']!r}: {problem['msg']}.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        keys = read(path) if path.exists() else ()
        if name in {other.name for other in keys}:
            raise ConfigError(f"{path}: there is a key named {name!r} already. Revoke it first, or take another name.")
        _write(path, (*keys, key))
    return key, secret


def revoke(path: Path, name: str) -> ApiKey:
    """Takes the key of this name or id out of the file. Raises ConfigError when there is none."""
    with _lock(path):
        keys = read(path)
        found = [key for key in keys if name in (key.id, key.name)]
        if not found:
            known = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(f"{path}: no key has the name or id {name!r}. Its keys: {known}.")
        _write(path, [key for key in keys if key is not found[0]])
    return found[0]


def find(keys: Sequence[ApiKey], secret: str) -> ApiKey | None:
    """The record of `secret`. All digests are compared, each in constant time, so that the time taken tells nothing."""
    if len(secret) > MAX_KEY_CHARS:
        return None
    digest = _digest(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    write_json_atomic(path, KeyFile(keys=tuple(keys)).model_dump(mode="json"))


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"), timeout=10)
