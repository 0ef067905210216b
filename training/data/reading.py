"""JSONL read strictly: every problem with its file and line, all of them in one error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from training.data.formats import KNOWN_FORMATS, RowProblem, detect_format, to_messages

MAX_LINE_BYTES = 4 << 20
MAX_PROBLEMS = 20


def read_rows(path: Path, format_name: str) -> tuple[str, list[dict[str, Any]]]:
    """The format found and the rows of a file, each as {"messages"} with "tools", "slice" and "template" where given.

    Raises:
        ConfigError: the file is missing, empty or in no known format, or some lines are bad; up to twenty are listed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A dataset is one JSONL file, one row a line; {KNOWN_FORMATS}")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            parsed = _parse(line)
            if format_name == "auto":
                format_name = detect_format(parsed)
            rows.append(_checked(parsed, format_name))
        except RowProblem as problem:
            problems.append(f"{path}:{number}: {problem}")
        except ConfigError as error:  # no known format: the rest of the file cannot be judged
            raise ConfigError("\n  - ".join([f"{path}:{number}: {error.message}", *problems])) from error
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{path}: reading stopped after {MAX_PROBLEMS} problems")
            break
    if problems:
        raise ConfigError(f"{path}: bad rows; mend or remove them\n  - " + "\n  - ".join(problems))
    if not rows:
        raise ConfigError(f"{path}: no rows in this file ({path.stat().st_size} bytes). One JSON object a line is needed; {KNOWN_FORMATS}")
    return format_name, rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from one, and lines that are not blank; a line over the limit comes cut just beyond it."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            tail = line
            while tail and not tail.endswith(b"\n") and len(line) > MAX_LINE_BYTES:
                tail = stream.readline(MAX_LINE_BYTES)
            if line.strip():
                yield number, line


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RowProblem(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written again
    except json.JSONDecodeError as error:
        raise RowProblem(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeError as error:
        raise RowProblem(f"not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise RowProblem("nested too deeply") from error
    if not isinstance(row, dict):
        raise RowProblem(f"a JSON {type(row).__name__}, an object is needed")
    return row


def _checked(row: dict[str, Any], format_name: str) -> dict[str, Any]:
    result: dict[str, Any] = {"messages": to_messages(row, format_name)}
    if row.get("tools") is not None:
        if not isinstance(row["tools"], list) or not all(isinstance(tool, dict) for tool in row["tools"]):
            raise RowProblem("'tools' must be a list of objects")
        result["tools"] = row["tools"]
    for key in ("slice", "template"):
        if row.get(key) is not None:
            if not isinstance(row[key], str):
                raise RowProblem(f"{key!r} is {row[key]!r:.60}; a text is needed")
            result[key] = row[key]
    return result
