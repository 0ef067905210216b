"""Folders that programs write."""

from __future__ import annotations

import shutil
from pathlib import Path


def fresh_folder(folder: Path) -> None:
    """Makes `folder` and empties it, so that a killed attempt leaves nothing in an artifact."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
