"""`python -m training.data.rows --config F`: a user's dataset as checked train.jsonl and heldout.jsonl.

Every source is read twice, once to check it and once to write what was chosen, so that 18 bytes a row are held in memory.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.files import require_free_space, sha256_json, write_json_atomic
from infra.process import run_program
from training.config import DataSource, RowsJob
from training.data.reading import RowReader
from training.data.sources import source_files
from training.folders import fresh_folder

TRAIN_NAME = "train.jsonl"
HELDOUT_NAME = "heldout.jsonl"
SUMMARY_NAME = "rows.json"
DIGEST_BYTES = 16


@dataclass
class Scan:
    """What the first reading of one source found."""

    reader: RowReader
    digests: bytearray = field(default_factory=bytearray)
    """What each row says, in `DIGEST_BYTES`."""
    can_be_scored: bytearray = field(default_factory=bytearray)
    """Whether each row has an answer."""
    is_kept: bytearray = field(default_factory=bytearray)
    """Whether each row is written."""

    @property
    def num_rows(self) -> int:
        """Rows of the source."""
        return len(self.is_kept)

    @property
    def num_kept(self) -> int:
        """Rows that are written."""
        return self.is_kept.count(1)

    @property
    def kept(self) -> Iterator[int]:
        """Rows that are written, in order."""
        return (row for row, flag in enumerate(self.is_kept) if flag)

    def digest(self, row: int) -> bytes:
        """What one row says."""
        return bytes(self.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])


def prepare_rows(job: RowsJob) -> None:
    """Reads, checks, mixes and splits the dataset. Raises ConfigError that lists what is wrong with it."""
    scans = scan_all([*job.train, *(job.heldout or ())], job.data.format)
    train = scans[: len(job.train)]
    heldout = scans[len(job.train) :] if job.heldout else choose_heldout(train, job.heldout_share, job.seed)
    if not any(scan.can_be_scored[row] for scan in heldout for row in scan.kept):
        raise ConfigError("the held-out rows are texts without an answer, so nothing could be scored. Name a heldout file of messages.")
    removed = drop_copies(train, heldout)
    mix(train, job.seed)
    if not any(scan.num_kept for scan in train):
        total = sum(scan.num_rows for scan in train)
        raise ConfigError(f"{job.train[0].path}: none of {total} training rows is left once the held-out rows are taken out. Add rows.")
    fresh_folder(job.output_dir)
    size = sum(path.stat().st_size for scan in scans for path in source_files(scan.reader.source))
    require_free_space(job.output_dir, 2 * size, "the rows")
    write_rows(job.output_dir / TRAIN_NAME, train)
    slices = write_rows(job.output_dir / HELDOUT_NAME, heldout)
    write_json_atomic(job.output_dir / SUMMARY_NAME, summary(job, train, slices, removed))
    write_manifest(job.output_dir, "dataset", job.provenance)


def scan_all(sources: Sequence[DataSource], format_name: str) -> list[Scan]:
    """Every source read and checked; all rows are kept so far. Raises one ConfigError with the problems of all sources."""
    scans, problems = [], []
    for source in sources:
        scan = Scan(RowReader(source, format_name))
        try:
            for row in scan.reader:
                scan.digests += bytes.fromhex(identity(row))[:DIGEST_BYTES]
                scan.can_be_scored.append("messages" in row)
                scan.is_kept.append(True)
        except ConfigError as error:
            problems.append(error.message)
        scans.append(scan)
    if problems:
        raise ConfigError("\n".join(problems))
    return scans


def choose_heldout(train: Sequence[Scan], heldout_share: float, seed: int) -> list[Scan]:
    """Takes a seeded part of the rows that can be scored out of `train`. Raises ConfigError where fewer than two rows can be.

    The same seed always holds out the same rows.
    """
    num_candidates = sum(scan.can_be_scored.count(1) for scan in train)
    if num_candidates < 2:
        raise ConfigError(
            f"{num_candidates} rows with an answer found; at least two are needed, one to train on and one to hold out. "
            "Add rows, or name a heldout file."
        )
    count = min(max(1, round(num_candidates * heldout_share)), num_candidates - 1)
    chosen = set(random.Random(seed).sample(range(num_candidates), count))
    heldout = [Scan(scan.reader, scan.digests, scan.can_be_scored, bytearray(scan.num_rows)) for scan in train]
    candidates = ((number, row) for number, scan in enumerate(train) for row, scored in enumerate(scan.can_be_scored) if scored)
    for place, (number, row) in enumerate(candidates):
        if place in chosen:
            heldout[number].is_kept[row], train[number].is_kept[row] = True, False
    return heldout


def drop_copies(train: Sequence[Scan], heldout: Sequence[Scan]) -> int:
    """Takes the training rows that say the same as a held-out row out of `train`; how many there were."""
    taken = {scan.digest(row) for scan in heldout for row in scan.kept}
    before = sum(scan.num_kept for scan in train)
    for scan in train:
        for row in scan.kept:
            if scan.digest(row) in taken:
                scan.is_kept[row] = False
    return before - sum(scan.num_kept for scan in train)


def mix(train: Sequence[Scan], seed: int) -> None:
    """Keeps a seeded part of each source, as many rows as its weight says. Raises ConfigError for weights on some only."""
    weights = [scan.reader.source.weight for scan in train]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return
    if len(given) < len(weights):
        missing = [scan.reader.source.path for scan, weight in zip(train, weights, strict=True) if weight is None]
        raise ConfigError(f"dataset.train: {missing} have no weight and others have. Give every source a weight, or none.")
    size = min(scan.num_kept / weight for scan, weight in zip(train, given, strict=True))
    for number, (scan, weight) in enumerate(zip(train, given, strict=True)):
        count = min(scan.num_kept, round(size * weight))
        chosen = set(random.Random(f"{seed}/{number}").sample(range(scan.num_kept), count))
        for place, row in enumerate(scan.kept):
            scan.is_kept[row] = place in chosen


def write_rows(path: Path, scans: Sequence[Scan]) -> Counter[str]:
    """The rows kept, one JSON object a line; how many there are by slice.

    Sources are interleaved evenly, so that the first rows of the file are a mix too.
    """
    parts = [_placed(scan, number) for number, scan in enumerate(scans)]
    slices: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as stream:
        for _, row in heapq.merge(*parts, key=lambda item: item[0]):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            slices[row.get("slice", "")] += 1
    return slices


def _placed(scan: Scan, number: int) -> Iterator[tuple[tuple[float, int], dict[str, Any]]]:
    """The rows kept of one source, each with its place between zero and one."""
    num_kept = scan.num_kept
    kept = (row for index, row in enumerate(scan.reader if num_kept else ()) if scan.is_kept[index])
    for index, row in enumerate(kept):
        yield ((index + 0.5) / num_kept, number), row


def summary(job: RowsJob, train: Sequence[Scan], heldout_slices: Counter[str], removed: int) -> dict[str, Any]:
    """What was found and chosen, for people."""
    return {
        "sources": [
            {"path": scan.reader.source.path, "format": scan.reader.format, "rows": scan.num_rows, "used": scan.num_kept} for scan in train
        ],
        "heldout_by_seed": None if job.heldout else job.seed,
        "train_rows": sum(scan.num_kept for scan in train),
        "heldout_rows": heldout_slices.total(),
        "train_rows_removed_as_heldout": removed,
        "heldout_slices": dict(sorted(heldout_slices.items())),
    }


def identity(row: dict[str, Any]) -> str:
    """Digest of what a row says, whatever slice it is in."""
    return sha256_json([row.get("messages"), row.get("tools"), row.get("text")])


if __name__ == "__main__":
    run_program(RowsJob, prepare_rows)
