"""Training rows as an exported model takes them, for quantization that looks at activations.

Rows are whole, prompt and answer, as the model will see them; held-out rows never come here.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open

from infra.errors import ArtifactError, ConfigError

TRAIN_NAME = "train.safetensors"
MAX_ROW_TOKENS = 512  # activations of a longer row say little more, and all of them are in memory at once


def calibration_inputs(tokens_dir: Path, num_rows: int, input_names: Collection[str]) -> list[dict[str, Any]]:
    """Up to `num_rows` rows, evenly spread over the training split, as inputs of the model by name, each (1, tokens).

    Raises ArtifactError where the split cannot be read, ConfigError where the model wants an input that is not known.
    """
    rows = [_inputs(ids) for ids in training_rows(tokens_dir, num_rows)]
    if unknown := sorted(set(input_names) - set(rows[0])):
        raise ConfigError(f"the exported model wants the inputs {unknown}; known are {sorted(rows[0])}. Choose a format without data.")
    return [{name: row[name] for name in input_names} for row in rows]


def training_rows(tokens_dir: Path, num_rows: int) -> list[Any]:
    """Token ids (int64) of rows evenly spread over the training split, each cut at MAX_ROW_TOKENS. Raises ArtifactError."""
    path = tokens_dir / TRAIN_NAME
    try:
        with safe_open(path, framework="np") as stream:
            offsets, ids = stream.get_tensor("offsets"), stream.get_slice("ids")
            spread = numpy.unique(numpy.linspace(0, len(offsets) - 2, num=min(num_rows, len(offsets) - 1), dtype=numpy.int64))
            ends = numpy.minimum(offsets[spread + 1], offsets[spread] + MAX_ROW_TOKENS)
            return [ids[start:end].astype(numpy.int64) for start, end in zip(offsets[spread].tolist(), ends.tolist(), strict=True)]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: no readable token rows ({error}). Run the step `render` again.") from error


def _inputs(ids: Any) -> dict[str, Any]:
    num_tokens = len(ids)
    return {
        "input_ids": ids[None],
        "attention_mask": numpy.ones((1, num_tokens), dtype=numpy.int64),
        "position_ids": numpy.arange(num_tokens, dtype=numpy.int64)[None],
        "beam_idx": numpy.zeros(1, dtype=numpy.int32),
    }
