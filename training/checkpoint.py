"""Checkpoints: complete or absent, safetensors and JSON only.

They lie in `<output_dir>-checkpoints/step-000050/`, beside the output folder and not in it, because an artifact must hold nothing else.
A folder is written under another name, flushed and renamed; a damaged one is passed over for the one before it. The whole place is
removed once the adapter is complete. Workers on several machines need it on storage that all of them see.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import ArtifactError
from infra.files import read_json, sha256_file, write_json_atomic

STATE_NAME = "checkpoint.json"
TENSORS_NAME = "tensors.safetensors"


@dataclass
class TrainState:
    """What a run must know to go on as if it had never stopped; batches and dropout follow from the step."""

    step: int = 0
    """Optimizer steps done."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Master weights and optimizer moments, flat."""
    history: dict[str, Any] = field(default_factory=dict)
    """Figures collected so far, for train.json."""


def checkpoints_folder(output_dir: Path) -> Path:
    """Where the checkpoints of the program that writes `output_dir` lie."""
    return output_dir.parent / f"{output_dir.name}-checkpoints"


def save(folder: Path, state: TrainState, fingerprint: str, keep: int) -> None:
    """Writes one checkpoint and removes all but the newest `keep`."""
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(state.tensors, str(partial / TENSORS_NAME))
    _flush(partial / TENSORS_NAME)
    facts = {"step": state.step, "fingerprint": fingerprint, "history": state.history, "sha256": sha256_file(partial / TENSORS_NAME)}
    write_json_atomic(partial / STATE_NAME, facts)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest(folder: Path, fingerprint: str) -> TrainState | None:
    """The newest whole checkpoint of the same run; None where there is none, or where data, base or settings were others."""
    for place in _complete(folder):
        try:
            facts = read_json(place / STATE_NAME)
            if facts["fingerprint"] != fingerprint or facts["sha256"] != sha256_file(place / TENSORS_NAME):
                continue
            return TrainState(facts["step"], load_file(str(place / TENSORS_NAME)), facts["history"])
        except (ArtifactError, OSError, SafetensorError, KeyError):
            continue
    return None


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
