"""`python -m training.data.rows --config F`: a user's dataset as checked train.jsonl and heldout.jsonl."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.files import require_free_space, sha256_json, write_json_atomic
from infra.process import run_program
from training.config import RowsJob
from training.data.reading import read_rows
from training.folders import fresh_folder

TRAIN_NAME = "train.jsonl"
HELDOUT_NAME = "heldout.jsonl"
SUMMARY_NAME = "rows.json"


def prepare_rows(job: RowsJob) -> None:
    """Reads, checks and splits the dataset. Raises ConfigError that lists what is wrong with it."""
    format_name, train = read_rows(job.train_path, job.data.format)
    heldout_format = None
    if job.heldout_path is not None:
        heldout_format, heldout = read_rows(job.heldout_path, job.data.format)
    else:
        train, heldout = split_rows(train, job.heldout_share, job.seed)
    kept = without_copies(train, heldout)
    if not kept:
        raise ConfigError(f"{job.train_path}: none of {len(train)} training rows is left once the held-out rows are taken out. Add rows.")
    fresh_folder(job.output_dir)
    require_free_space(job.output_dir, 2 * job.train_path.stat().st_size, "the rows")
    write_rows(job.output_dir / TRAIN_NAME, kept)
    write_rows(job.output_dir / HELDOUT_NAME, heldout)
    summary = {
        "format": format_name,
        "heldout_format": heldout_format,
        "heldout_by_seed": None if job.heldout_path else job.seed,
        "train_rows": len(kept),
        "heldout_rows": len(heldout),
        "train_rows_removed_as_heldout": len(train) - len(kept),
        "heldout_slices": dict(sorted(Counter(row.get("slice", "") for row in heldout).items())),
    }
    write_json_atomic(job.output_dir / SUMMARY_NAME, summary)
    write_manifest(job.output_dir, "dataset", job.provenance)


def split_rows(rows: list[dict[str, Any]], heldout_share: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows, each in file order; the same seed always holds out the same rows. Raises ConfigError below two rows."""
    if len(rows) < 2:
        raise ConfigError(f"{len(rows)} row found; at least two are needed, one to train on and one to hold out.")
    count = min(max(1, round(len(rows) * heldout_share)), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in sorted(chosen)]


def without_copies(train: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training rows that say something else than every held-out row."""
    taken = {_identity(row) for row in heldout}
    return [row for row in train if _identity(row) not in taken]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _identity(row: Mapping[str, Any]) -> str:
    return sha256_json([row["messages"], row.get("tools")])


if __name__ == "__main__":
    run_program(RowsJob, prepare_rows)
