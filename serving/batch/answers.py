"""Rows of answers, and the files of them.

Every row has the keys of `SCHEMA`, null where there is nothing to say: either `text` and what goes with it, or an `error`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from infra.files import written_whole
from serving.config import BatchFormat
from serving.errors import ApiError

_TEXT, _COUNT = pyarrow.string(), pyarrow.int64()
_CALL = pyarrow.struct({"id": _TEXT, "type": _TEXT, "function": pyarrow.struct({"name": _TEXT, "arguments": _TEXT})})
_USAGE = pyarrow.struct({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_ERROR = pyarrow.struct({"status": _COUNT, "type": _TEXT, "code": _TEXT, "param": _TEXT, "message": _TEXT})
SCHEMA = pyarrow.schema(
    {
        "row": _COUNT,
        "custom_id": _TEXT,
        "text": _TEXT,
        "finish_reason": _TEXT,
        "tool_calls": pyarrow.list_(_CALL),
        "usage": _USAGE,
        "response": _TEXT,
        "error": _ERROR,
    }
)
"""In Parquet `response` is JSON text, in JSONL an object."""

AnswerRow = dict[str, Any]


@dataclass
class Tally:
    """What has become of some rows."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Tally) -> None:
        """Counts other rows too."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def answer_row(number: int, custom_id: str | None, body: Mapping[str, Any], has_full_answer: bool) -> AnswerRow:
    """The row of an answer, given as the body that would be sent over HTTP; its first choice is the one shown."""
    choice = body["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    response = {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {
        "row": number,
        "custom_id": custom_id,
        "text": message["content"],
        "finish_reason": choice["finish_reason"],
        "tool_calls": message.get("tool_calls"),
        "usage": body["usage"],
        "response": response if has_full_answer else None,
        "error": None,
    }


def error_row(number: int, custom_id: str | None, error: ApiError) -> AnswerRow:
    """The row of a request that has no answer."""
    return {**dict.fromkeys(SCHEMA.names), "row": number, "custom_id": custom_id, "error": {"status": error.status, **error.body["error"]}}


def tally_of(row: AnswerRow) -> Tally:
    """What one row counts for."""
    usage = row["usage"] or {"prompt_tokens": 0, "completion_tokens": 0}
    return Tally(1, int(row["error"] is not None), usage["prompt_tokens"], usage["completion_tokens"])


def write_part(path: Path, rows: Sequence[AnswerRow], format: BatchFormat) -> None:
    """Writes one file of answers, whole or not at all."""
    with written_whole(path) as partial:
        if format == "parquet":
            shown = [{**row, "response": row["response"] and json.dumps(row["response"], ensure_ascii=False)} for row in rows]
            parquet.write_table(pyarrow.Table.from_pylist(shown, schema=SCHEMA), partial)
            return
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
