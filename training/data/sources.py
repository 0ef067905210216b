"""Rows as they lie in files, one after another and never all in memory (a `.json` array excepted), each with its place for messages.

JSONL, JSON, CSV, Parquet, a folder of those, a folder that Hugging Face's `save_to_disk` wrote, or `hf:OWNER/NAME[@REVISION]` from the hub.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.files import read_json
from infra.models import fetch_dataset
from training.config import DataSource
from training.data.formats import KNOWN_FORMATS, RowProblem

MAX_LINE_BYTES = 4 << 20
MAX_JSON_BYTES = 1 << 30  # an array is parsed whole
BATCH_ROWS = 1024
Raw = tuple[str, "dict[str, Any] | RowProblem"]
"""Where a row is, and the row or what is wrong with it."""


def raw_rows(source: DataSource) -> Iterator[Raw]:
    """Every row of a source. Raises ConfigError where there is no such file or none of a known kind."""
    for path in source_files(source):
        yield from READERS[path.suffix](path)


def source_files(source: DataSource) -> list[Path]:
    """The files of a source in order, fetched first where they are remote. Raises ConfigError where there are none."""
    path = fetch_dataset(source.path) if source.path.startswith("hf:") else Path(source.path)
    if path.is_file() and path.suffix in READERS:
        return [path]
    if path.is_dir():
        return _folder_files(path, source.split)
    found = f"a file {path.suffix or 'without suffix'}" if path.is_file() else "no such file"
    raise ConfigError(f"{path}: {found}. A dataset is a file {', '.join(READERS)} or a folder of them; {KNOWN_FORMATS}")


def _folder_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json")["splits"]
        if split not in splits:
            raise ConfigError(f"{folder}: no split {split!r}; it has {splits}. Name one as split.")
        folder = folder / split
    if (folder / "state.json").is_file():
        return [folder / Path(entry["filename"]).name for entry in read_json(folder / "state.json")["_data_files"]]
    files = sorted(path for path in folder.rglob("*") if path.suffix in READERS and not path.name.startswith("dataset_info"))
    of_split = [path for path in files if split in path.stem.split("-")[0].split("_") or split in path.relative_to(folder).parts[:-1]]
    if not files:
        raise ConfigError(f"{folder}: holds none of {', '.join(READERS)}. A folder of such files is needed.")
    return of_split or files


def _jsonl(path: Path) -> Iterator[Raw]:
    """Lines that are not blank, numbered from one; one over the limit is a problem and the next is read."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            tail = line
            while tail and not tail.endswith(b"\n") and len(line) > MAX_LINE_BYTES:
                tail = stream.readline(MAX_LINE_BYTES)
            if line.strip():
                yield f"{path}:{number}", _attempt(parse_object, line)


def parse_object(line: bytes) -> dict[str, Any]:
    """One JSON object. Raises RowProblem."""
    if len(line) > MAX_LINE_BYTES:
        raise RowProblem(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        return _writable(json.loads(line.decode("utf-8")))
    except json.JSONDecodeError as error:
        raise RowProblem(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeError as error:
        raise RowProblem(f"not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise RowProblem("nested too deeply") from error


def _json(path: Path) -> Iterator[Raw]:
    """The objects of an array, which may be the only list in an object."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(
            f"{path}: {path.stat().st_size} bytes in one JSON array. Write one object a line (.jsonl), which is read in parts."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}). An array of objects is needed; one object a line is called .jsonl.") from error
    lists = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else [data]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ConfigError(f"{path}: a JSON {type(data).__name__} with {len(lists)} lists. An array of objects is needed.")
    for number, row in enumerate(lists[0], start=1):
        yield f"{path} row {number}", _attempt(_writable, row)


def _csv(path: Path) -> Iterator[Raw]:
    """Rows below a header line; every cell is a text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield place, RowProblem(f"not as many cells as the header has columns ({len(reader.fieldnames or ())})")
                else:
                    yield place, dict(row)
        except (csv.Error, UnicodeError) as error:
            raise ConfigError(f"{path}:{reader.line_num + 1}: not CSV in UTF-8 ({error}). Mend the file or write JSONL.") from error


def _parquet(path: Path) -> Iterator[Raw]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as stream:
            yield from _batches(path, stream.iter_batches(batch_size=BATCH_ROWS))
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file ({error}). Write it again.") from error


def _arrow(path: Path) -> Iterator[Raw]:
    """A file of `save_to_disk`: Arrow's streaming format."""
    from pyarrow import ArrowException, ipc, memory_map

    try:
        with memory_map(str(path)) as mapped, ipc.open_stream(mapped) as stream:
            yield from _batches(path, stream)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not an Arrow stream ({error}). Save the dataset again.") from error


def _batches(path: Path, batches: Any) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for part in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(part, BATCH_ROWS).to_pylist():
                number += 1
                yield f"{path} row {number}", _attempt(_writable, {key: value for key, value in row.items() if value is not None})


def _writable(row: Any) -> dict[str, Any]:
    """An object that can be written as UTF-8 JSON: half a surrogate pair, bytes and dates cannot. Raises RowProblem."""
    if not isinstance(row, dict):
        raise RowProblem(f"a JSON {type(row).__name__}, an object is needed")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except TypeError as error:
        raise RowProblem(f"not a text, number or list: {error}") from error
    except UnicodeError as error:
        raise RowProblem(f"not UTF-8 text: {error}") from error
    return row


def _attempt(make: Callable[[Any], dict[str, Any]], value: Any) -> dict[str, Any] | RowProblem:
    try:
        return make(value)
    except RowProblem as problem:
        return problem


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip
