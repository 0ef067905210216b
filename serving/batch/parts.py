"""The rows of the input, counted and divided into parts; nothing of them is kept.

- A row is a line that is not blank, or a row of a Parquet file; rows are numbered from 0, through all files in the order of their names.
- Parts depend on the files and on their size in rows alone, so that every run over the same input divides it alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyarrow import ArrowException, parquet

from infra.config import Config
from infra.errors import ConfigError
from infra.files import CHUNK_BYTES, sha256_file
from serving.config import BatchFormat

FORMATS: dict[str, BatchFormat] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class InputFile(Config):
    """What one file of the input holds."""

    sha256: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one file, answered in one file."""

    number: int
    path: str
    start: int
    """Byte at which the first row starts, or in a Parquet file its place there."""
    first_row: int
    """Number of the first row in the whole input."""
    num_rows: int


@dataclass(frozen=True)
class Plan:
    """The whole input."""

    files: dict[str, InputFile]
    """By path, as seen from the input's folder."""
    parts: list[Part]
    format: BatchFormat
    """That of the files; JSONL where there are both kinds."""

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(file.num_rows for file in self.files.values())


def make_plan(source: Path, rows_per_part: int) -> Plan:
    """Reads every file once, for digests and row starts. Raises ConfigError where there is no file of a known kind, or not a row in any."""
    files: dict[str, InputFile] = {}
    parts: list[Part] = []
    paths = input_files(source)
    for path in paths:
        first_row = sum(file.num_rows for file in files.values())
        scan = _scan_parquet if FORMATS[path.suffix] == "parquet" else _scan_jsonl
        file, starts = scan(path, rows_per_part)
        for place, start in enumerate(starts):
            before = place * rows_per_part
            num_rows = min(rows_per_part, file.num_rows - before)
            parts.append(Part(len(parts), str(path.absolute()), start, first_row + before, num_rows))
        files[path.relative_to(source).as_posix() if path != source else path.name] = file
    if not parts:
        raise ConfigError(f"{source}: no rows in it. At least one request is needed.")
    formats = {FORMATS[path.suffix] for path in paths}
    return Plan(files, parts, formats.pop() if len(formats) == 1 else "jsonl")


def input_files(source: Path) -> list[Path]:
    """The files of an input in order. Raises ConfigError where there are none."""
    if source.is_file() and source.suffix in FORMATS:
        return [source]
    needed = f"requests are read from files {', '.join(FORMATS)} or a folder of them."
    if not source.is_dir():
        found = f"a file {source.suffix or 'without suffix'}" if source.is_file() else "no such file"
        raise ConfigError(f"{source}: {found}; {needed}")
    # As other readers of such folders do, files and folders that begin with a dot or an underscore are passed over.
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix in FORMATS and path.is_file() and not any(name.startswith((".", "_")) for name in path.relative_to(source).parts)
    ]
    if not files:
        raise ConfigError(f"{source}: no such file in this folder; {needed}")
    return files


def _scan_jsonl(path: Path, rows_per_part: int) -> tuple[InputFile, list[int]]:
    digest = hashlib.sha256()
    starts, num_rows = [], 0
    with path.open("rb") as stream:
        for start in _line_starts(stream, digest):
            if num_rows % rows_per_part == 0:
                starts.append(start)
            num_rows += 1
        size_bytes = stream.tell()
    return InputFile(sha256=digest.hexdigest(), size_bytes=size_bytes, num_rows=num_rows), starts


def _line_starts(stream: IO[bytes], digest: Any) -> Iterator[int]:
    """The byte at which each line that is not blank starts; a line of any length is read in pieces."""
    start = position = 0
    is_blank = True
    while piece := stream.readline(CHUNK_BYTES):
        digest.update(piece)
        position += len(piece)
        is_blank = is_blank and piece.isspace()
        if piece.endswith(b"\n"):
            if not is_blank:
                yield start
            start, is_blank = position, True
    if not is_blank:
        yield start


def _scan_parquet(path: Path, rows_per_part: int) -> tuple[InputFile, list[int]]:
    try:
        num_rows = parquet.read_metadata(path).num_rows
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file ({error}). Write it again.") from error
    file = InputFile(sha256=sha256_file(path), size_bytes=path.stat().st_size, num_rows=num_rows)
    return file, list(range(0, num_rows, rows_per_part))
