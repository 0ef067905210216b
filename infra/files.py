"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import ArtifactError, ConfigError

CHUNK_BYTES = 1 << 20
PARTIAL_SUFFIX = ".partial"
MANIFEST_NAME = "manifest.json"
"""Of an artifact (`infra/contracts.py`); here for processes that check none."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` to write to: it becomes `path` when the block ends well, and is gone otherwise; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its name is nobody else's: threads have one process number, and pods that share a folder often have the same.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        yield partial
        with partial.open("r+b") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, never half; parents are made."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """The same for bytes."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def write_json_atomic(path: Path, value: Any) -> None:
    """`value` as indented JSON with sorted keys, written whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file of ours; raises ArtifactError when absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file. The step that writes it did not finish; run it again.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). Remove its folder and run the step again.") from error


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises ConfigError when the disk that holds `folder` has less than `needed_bytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{existing}: {free_bytes / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB needed for {purpose}. "
            "Free some space or point SLIPWAY_HOME at a larger disk."
        )
