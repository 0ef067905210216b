"""Token rows on disk: flat arrays in one safetensors file a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from infra.errors import ArtifactError


@dataclass(frozen=True)
class TokenRow:
    """One row, ready to train on."""

    row: int
    """Index in the split's JSONL file."""
    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    """Whether each token is one the model must learn to write; as long as `ids`."""
    last_answer_start: int = 0
    """Position of the first token of the last answer; not stored."""


def write_token_rows(folder: Path, split: str, rows: Sequence[TokenRow]) -> None:
    """Writes `<split>.safetensors`: ids int32 (tokens,), supervised uint8 (tokens,), offsets int64 (rows + 1,), rows int64 (rows,)."""
    lengths = [len(row.ids) for row in rows]
    arrays = {
        "ids": np.array([token for row in rows for token in row.ids], dtype=np.int32),
        "supervised": np.array([mark for row in rows for mark in row.supervised], dtype=np.uint8),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        "rows": np.array([row.row for row in rows], dtype=np.int64),
    }
    save_file(arrays, str(folder / f"{split}.safetensors"))


def read_token_rows(folder: Path, split: str) -> list[TokenRow]:
    """The rows of one split. Raises ArtifactError where the file is absent or damaged."""
    path = folder / f"{split}.safetensors"
    try:
        arrays = load_file(str(path))
        ids, marks = arrays["ids"].tolist(), arrays["supervised"].astype(bool).tolist()
        offsets, rows = arrays["offsets"].tolist(), arrays["rows"].tolist()
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: no readable token rows ({error}). Run the step that renders the dataset again.") from error
    return [
        TokenRow(row, tuple(ids[start:end]), tuple(marks[start:end]))
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True)
    ]
