"""Whether rows that are scored were trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from infra.files import sha256_json
from pipelines.proof.checks import Check, listed

TRAIN_NAME, HELDOUT_NAME = "train.jsonl", "heldout.jsonl"


def check_leaks(rows_dir: Path, limit_rows: int | None) -> Check:
    """Whether a held-out row says the same as one of the training rows that were used."""
    heldout = {digest: row for row, digest in enumerate(_identities(rows_dir / HELDOUT_NAME, None))}
    found = [(heldout[digest], row) for row, digest in enumerate(_identities(rows_dir / TRAIN_NAME, limit_rows)) if digest in heldout]
    problems = [f"held-out row {held} is training row {row}" for held, row in found]
    return listed("held-out rows", "dataset", f"{len(heldout)} held-out rows with the training rows", problems, "none was trained on")


def _identities(path: Path, limit_rows: int | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            if limit_rows is not None and number >= limit_rows:
                return
            row = json.loads(line)
            yield sha256_json([row.get("messages"), row.get("tools"), row.get("text")])
