"""The shapes of row that are known, each turned into one list of messages."""

from __future__ import annotations

import json
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
    "function_call": "assistant",
}
KNOWN_FORMATS = """known formats are
  messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  prompt_completion  {"prompt": "...", "completion": "..."}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  text               {"text": "..."}: learnt as it stands, without the chat template; has no answer that could be scored"""


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
    messages = [_normalized(message, index) for index, message in enumerate(CONVERTERS[format_name](row))]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem("no assistant turn, so there is nothing to learn from this row")
    return messages


def normalized_tools(tools: Any) -> list[dict[str, Any]]:
    """A row's tools as a list of objects; a text of JSON is parsed. Raises RowProblem."""
    found = _parsed(tools, "tools")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowProblem("'tools' must be a list of objects")
    return found


def _normalized(message: Any, index: int) -> dict[str, Any]:
    """A checked message without empty fields, its tool calls in the shape that chat templates read. Raises RowProblem."""
    if not isinstance(message, Mapping):
        raise RowProblem(f"message {index} is {type(message).__name__}, an object with role and content is needed")
    if message.get("role") not in ROLES:
        raise RowProblem(f"message {index} has role {message.get('role')!r}; one of {', '.join(ROLES)} is needed")
    kept = {key: value for key, value in message.items() if value is not None and value != []}
    if "tool_calls" in kept:
        kept["tool_calls"] = [_tool_call(call, index) for call in _as_list(kept["tool_calls"], f"message {index}: tool_calls")]
    content, is_answer = kept.get("content"), kept["role"] == "assistant"
    if isinstance(content, str) and (content or not is_answer):
        return kept
    if not is_answer or "tool_calls" not in kept or content:
        raise RowProblem(f"message {index} ({message['role']}) has content {message.get('content')!r:.60}; a text is needed")
    return {**kept, "content": ""}


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments": {...}}}`, from that, from its inner part, or with arguments as JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowProblem(f"message {index} has the tool call {call!r:.60}; an object with a name and arguments is needed")
    arguments = _parsed(inner.get("arguments", {}), f"arguments of {inner['name']}")
    if not isinstance(arguments, Mapping):
        raise RowProblem(f"message {index} calls {inner['name']} with arguments {arguments!r:.60}; an object is needed")
    named = {"id": call["id"]} if call.get("id") else {}
    given = {key: value for key, value in arguments.items() if value is not None}
    return {**named, "type": "function", "function": {"name": inner["name"], "arguments": given}}


def _parsed(value: Any, name: str) -> Any:
    """A text of JSON parsed, anything else as it is: CSV cells and OpenAI's arguments are texts."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{name!r} is a text that is not JSON: {value!r:.60}") from error


def _from_messages(row: Row) -> Messages:
    return _as_list(_parsed(row["messages"], "messages") if str(row["messages"])[:1] == "[" else row["messages"], "messages")


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
        said = turn.get("value")
        if speaker == "function_call":
            calls = _parsed(said, f"turn {index}")
            turns.append({"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]})
        else:
            turns.append({"role": SHAREGPT_ROLES[speaker], "content": said})
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
    "text": ("text",),
}
CONVERTERS: dict[str, Callable[[Row], Messages]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
}
