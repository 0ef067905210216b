"""The rows of a part, one after another: JSON objects, or what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet
from pydantic_core import from_json

from infra.errors import ConfigError
from serving.batch.parts import FORMATS, Part
from serving.errors import ApiError

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20
JSON_COLUMNS = ("body", "messages", "tools", "response_format", "structured_outputs")
"""Of a Parquet file, whose columns have one type each: these may hold the value as JSON text."""

Row = dict[str, Any]


class RowReader:
    """Reads parts; cheapest in their order, because a Parquet file can only be read forward."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes
        self._parquet: _ParquetFile | None = None

    def read(self, part: Part) -> Iterator[Row | ApiError]:
        """Every row of the part. Raises ConfigError where its file has changed so much that they are not there."""
        path = Path(part.path)
        try:
            rows = self._parquet_rows(path, part) if FORMATS[path.suffix] == "parquet" else self._json_lines(path, part)
            num_rows = 0
            for row in rows:
                num_rows += 1
                yield row
        except (OSError, ArrowException) as error:
            raise ConfigError(f"{path}: cannot be read any more ({error}). Bring it back; the same command resumes.") from error
        if num_rows < part.num_rows:
            raise ConfigError(f"{path}: has changed since it was counted. Write the answers to what it is now to another folder.")

    def _json_lines(self, path: Path, part: Part) -> Iterator[Row | ApiError]:
        num_left = part.num_rows
        with path.open("rb") as stream:
            stream.seek(part.start)
            while num_left and (line := stream.readline(self._max_row_bytes + 1)):
                tail, is_blank = line, line.isspace()
                while tail and not tail.endswith(b"\n") and len(line) > self._max_row_bytes:
                    tail = stream.readline(self._max_row_bytes)
                    is_blank = is_blank and (not tail or tail.isspace())
                if not is_blank:
                    num_left -= 1
                    yield self._json_object(line)

    def _json_object(self, line: bytes) -> Row | ApiError:
        if len(line) > self._max_row_bytes:
            return self._too_large()
        try:
            row = from_json(line, allow_inf_nan=False)
        except ValueError as error:
            return ApiError(f"the row is not valid JSON: {error}. Write one JSON object a line.")
        return row if isinstance(row, dict) else ApiError(f"the row is a JSON {type(row).__name__}. Write one JSON object a line.")

    def _parquet_rows(self, path: Path, part: Part) -> Iterator[Row | ApiError]:
        if self._parquet is None or not self._parquet.can_reach(path, part.start):
            self._parquet = _ParquetFile(path, part.start)
        yield from map(self._checked, self._parquet.rows(part.start, part.num_rows))

    def _checked(self, row: Row) -> Row | ApiError:
        try:
            present = {key: _parsed(key, value) for key, value in _present(row).items()}
            size = len(json.dumps(present))
        except ApiError as error:
            return error
        except TypeError as error:
            return ApiError(f"the row cannot be written as JSON: {error}. Texts, numbers, lists and structs are read.")
        return present if size <= self._max_row_bytes else self._too_large()

    def _too_large(self) -> ApiError:
        message = f"the row is larger than {self._max_row_bytes} bytes, the most that is read. Send less, or raise serve.max_body_bytes."
        return ApiError(message, 413)


class _ParquetFile:
    """A Parquet file from one row on."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        file = parquet.ParquetFile(path, buffer_size=BUFFER_BYTES)
        self._first, group = 0, 0
        while self._first + (size := file.metadata.row_group(group).num_rows) <= start:
            self._first, group = self._first + size, group + 1
        self._batches = file.iter_batches(BATCH_ROWS, row_groups=list(range(group, file.num_row_groups)))
        self._batch = next(self._batches, None)

    def can_reach(self, path: Path, start: int) -> bool:
        """Whether a row lies ahead."""
        return path == self._path and start >= self._first

    def rows(self, start: int, num_rows: int) -> Iterator[Row]:
        """Consecutive rows; those before them are passed over."""
        end = start + num_rows
        while start < end:
            while self._batch is not None and start >= self._first + self._batch.num_rows:
                self._first += self._batch.num_rows
                self._batch = next(self._batches, None)
            if self._batch is None:
                return
            rows = self._batch.slice(start - self._first, end - start).to_pylist()
            start += len(rows)
            yield from rows


def _present(value: Any) -> Any:
    """Without the fields that a row lacks: in a Parquet file they are null, because all rows share its columns."""
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value


def _parsed(key: str, value: Any) -> Any:
    if key not in JSON_COLUMNS or not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"{key}: a text that is not JSON: {error}.", param=key) from error
