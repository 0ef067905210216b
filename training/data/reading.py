"""Rows read strictly: every problem with its file and line, all of them in one error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infra.errors import ConfigError
from training.config import DataSource
from training.data.formats import KNOWN_FORMATS, RowProblem, detect_format, normalized_tools, to_messages
from training.data.sources import raw_rows

MAX_PROBLEMS = 20


class RowReader:
    """The checked rows of one source, in order: {"messages"}, or {"text"}, with "tools", "slice", "template" and "language" where given."""

    def __init__(self, source: DataSource, format_name: str = "auto") -> None:
        self.source = source
        self.format = source.format if source.format != "auto" else format_name
        """What was asked for, and after the first row what was found."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every row.

        Raises:
            ConfigError: the source is missing, empty or in no known format, or some rows are bad; up to twenty are listed.
        """
        problems: list[str] = []
        is_empty = True
        for place, raw in raw_rows(self.source):
            is_empty = False
            try:
                row = self._checked(raw, place)
            except RowProblem as problem:
                problems.append(f"{place}: {problem}")
                if len(problems) == MAX_PROBLEMS:
                    problems.append(f"reading stopped after {MAX_PROBLEMS} problems")
                    break
            except ConfigError as error:  # no known format: the rest of the source cannot be judged
                raise ConfigError("\n  - ".join([error.message, *problems])) from error
            else:
                if not problems:
                    yield row
        if problems:
            raise ConfigError(f"{self.source.path}: bad rows; mend or remove them\n  - " + "\n  - ".join(problems))
        if is_empty:
            raise ConfigError(f"{self.source.path}: no rows in it. At least one is needed; {KNOWN_FORMATS}")

    def _checked(self, raw: dict[str, Any] | RowProblem, place: str) -> dict[str, Any]:
        if isinstance(raw, RowProblem):
            raise raw
        if self.format == "auto":
            try:
                self.format = detect_format(raw)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error.message}") from error
        return checked_row(raw, self.format)


def checked_row(raw: dict[str, Any], format_name: str) -> dict[str, Any]:
    """One row of a known format in the shape that is stored. Raises RowProblem."""
    if format_name == "text":
        text = raw.get("text")
        if not isinstance(text, str) or not text:
            raise RowProblem(f"'text' is {text!r:.60}; a text is needed")
        result: dict[str, Any] = {"text": text}
    else:
        result = {"messages": to_messages(raw, format_name)}
        if raw.get("tools"):
            result["tools"] = normalized_tools(raw["tools"])
    for key in ("slice", "template", "language"):
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise RowProblem(f"{key!r} is {raw[key]!r:.60}; a text is needed")
            result[key] = raw[key]
    return result
