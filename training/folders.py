"""Folders that programs write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from infra.contracts import MANIFEST_NAME

TEXT_SUFFIXES = (".json", ".jinja")


def fresh_folder(folder: Path) -> None:
    """Makes `folder` and empties it, so that a killed attempt leaves nothing in an artifact."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def copy_texts(source: Path, folder: Path, names: Iterable[str] | None = None) -> None:
    """Copies a model's configuration, tokenizer and template, or just the files named; never its manifest."""
    chosen = [path.name for path in source.iterdir() if path.suffix in TEXT_SUFFIXES and path.name != MANIFEST_NAME]
    for name in chosen if names is None else names:
        shutil.copyfile(source / name, folder / name)


def checkpoints_folder(output_dir: Path) -> Path:
    """Where the checkpoints of the program that writes `output_dir` lie: beside it, because an artifact must hold nothing else."""
    return output_dir.parent / f"{output_dir.name}-checkpoints"
