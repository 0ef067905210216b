"""The shapes of row that are known, each turned into one list of messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.errors import ConfigError

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
KNOWN_FORMATS = """known formats are
  messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  prompt_completion  {"prompt": "...", "completion": "..."}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}"""


class RowProblem(ValueError):
    """What is wrong with one row; the reader adds file and line."""


def detect_format(row: Row) -> str:
    """Name of the format whose keys `row` has. Raises ConfigError that names the known formats."""
    for name, keys in REQUIRED_KEYS.items():
        if all(key in row for key in keys):
            return name
    raise ConfigError(f"a row with keys {sorted(row)[:12]} is in no known format; {KNOWN_FORMATS}")


def to_messages(row: Row, format_name: str) -> Messages:
    """The messages of a row, checked. Raises RowProblem."""
    missing = [key for key in REQUIRED_KEYS[format_name] if key not in row]
    if missing:
        raise RowProblem(f"no {missing[0]!r}, which a row of format {format_name!r} needs (its keys are {sorted(row)[:12]})")
    messages = CONVERTERS[format_name](row)
    for index, message in enumerate(messages):
        _check_message(message, index)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem("no assistant turn, so there is nothing to learn from this row")
    return messages


def _check_message(message: Any, index: int) -> None:
    if not isinstance(message, Mapping):
        raise RowProblem(f"message {index} is {type(message).__name__}, an object with role and content is needed")
    if message.get("role") not in ROLES:
        raise RowProblem(f"message {index} has role {message.get('role')!r}; one of {', '.join(ROLES)} is needed")
    content = message.get("content")
    if isinstance(content, str) and (content or message["role"] != "assistant"):
        return
    if message["role"] != "assistant" or not message.get("tool_calls"):
        raise RowProblem(f"message {index} ({message['role']}) has content {content!r:.60}; a text is needed")


def _from_messages(row: Row) -> Messages:
    return _as_list(row["messages"], "messages")


def _from_prompt_completion(row: Row) -> Messages:
    prompt, completion = row["prompt"], row["completion"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _as_list(prompt, "prompt")
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else _as_list(completion, "completion")
    return asked + answered


def _from_alpaca(row: Row) -> Messages:
    given = row.get("input") or ""
    if not isinstance(row["instruction"], str) or not isinstance(given, str):
        raise RowProblem("'instruction' and 'input' must be texts")
    asked = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
    return [*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _from_sharegpt(row: Row) -> Messages:
    turns = []
    for index, turn in enumerate(_as_list(row["conversations"], "conversations")):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowProblem(f"turn {index} is from {speaker!r}; one of {', '.join(SHAREGPT_ROLES)} is needed")
        turns.append({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")})
    return [*_system(row), *turns]


def _system(row: Row) -> Messages:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _as_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowProblem(f"{name!r} is {value!r:.60}; a list with at least one message is needed")
    return list(value)


REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
CONVERTERS: dict[str, Callable[[Row], Messages]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
}
