"""The grammar that a request asks for, in whichever of the API's fields it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from serving.engines.base import Grammar
from serving.errors import ApiError
from serving.grammars import json_grammar, regex_grammar
from serving.openai_messages import JsonObjectFormat, NamedTool, ResponseFormat, SchemaFormat, StructuredOutputs, TextFormat, Tool

ANY_OBJECT = {"type": "object"}
SPECIAL = frozenset("\\^$.|?*+()[]{}")


def wanted_grammar(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    forced_tools: Sequence[Tool],
) -> tuple[Grammar, str] | None:
    """The grammar and the field that asked for it; None where the answer is free. Raises ApiError on two, or on one that cannot be kept."""
    wanted: dict[str, Any] = {}
    if response_format is not None and not isinstance(response_format, TextFormat):
        wanted["response_format"] = response_format
    if structured is not None:
        wanted["structured_outputs"] = structured
    if forced_tools:
        wanted["tool_choice"] = forced_tools
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ApiError(f"{' and '.join(wanted)} both say what the answer must be. Send one of them.", param=list(wanted)[1])
    ((param, value),) = wanted.items()
    try:
        return _grammar(value), param
    except ValueError as error:
        raise ApiError(f"{param}: {error}.", param=param, code="invalid_value") from error


def _grammar(value: JsonObjectFormat | SchemaFormat | StructuredOutputs | Sequence[Tool]) -> Grammar:
    if isinstance(value, JsonObjectFormat):
        return json_grammar(ANY_OBJECT)
    if isinstance(value, SchemaFormat):
        return json_grammar(value.json_schema.json_schema)
    if isinstance(value, StructuredOutputs):
        return _structured(value)
    return _call_grammar(value)


def _structured(value: StructuredOutputs) -> Grammar:
    given = value.model_dump(by_alias=True, exclude_none=True)
    if len(given) != 1 or value.json_object is False:
        raise ValueError(f"one of json, regex, choice and json_object=true is needed; {sorted(given)} are given")
    if value.regex is not None:
        return regex_grammar(value.regex)
    if value.choice is not None:
        return regex_grammar("|".join("".join(f"\\{char}" if char in SPECIAL else char for char in text) for text in value.choice))
    if isinstance(value.json_value, str):
        return json_grammar(from_json(value.json_value))
    return json_grammar(value.json_value if value.json_value is not None else ANY_OBJECT)


def _call_grammar(tools: Sequence[Tool]) -> Grammar:
    """One call of one of the tools, as bare JSON. Its parameters' definitions move to the top, where the compiler reads them."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        parameters = dict(tool.function.parameters or ANY_OBJECT)
        for key in ("$defs", "definitions"):
            definitions |= parameters.pop(key, None) or {}
        properties = {"name": {"const": tool.function.name}, "arguments": parameters}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False})
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json_grammar({**schema, "$defs": definitions} if definitions else schema)


def forced_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | None) -> Sequence[Tool]:
    """The tools of which one must be called; empty where the model decides. Raises ApiError where there is no such tool."""
    if choice is None or choice in ("none", "auto"):
        return ()
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools or () if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(f"tool_choice: no tool is named {choice.function.name!r}. Send it in tools.", param="tool_choice")
        return named
    if not tools:
        raise ApiError(f"tool_choice: {choice!r} without tools. Send tools, or leave it out.", param="tool_choice")
    return tools
