"""Tool calls compared field by field: which part of a call a model gets wrong, not only that it does.

- A call is `{"name": ..., "arguments": {...}}`, with `parameters` read as `arguments`, either as an object or as its JSON text, bare,
  under OpenAI's `function`, in a list, or between `<tool_call>` and `</tool_call>`.
- The fields of a call are its name and each argument that is wanted or given; several calls are compared in their order.
- A row that expects no call has one field, which is right when none is made; what its text says is left to other scorers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Literal

from infra.evaluation.json_text import parse, same

Outcome = Literal["right", "missing", "extra", "wrong"]
Call = tuple[str, dict[str, Any]]

NAME_FIELD = "name"
NO_CALL_FIELD = "(no call)"

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def read_calls(text: str) -> list[Call]:
    """The calls in a text, each as name and arguments; raises ValueError where the text is none."""
    tagged = _TAGGED.findall(text)
    found = [parse(each) for each in tagged] if tagged else parse(text)
    return [_call(each) for each in (found if isinstance(found, list) and found else [found])]


def field_outcomes(answer: str, expected: str) -> list[tuple[str, Outcome]]:
    """Every field that is wanted or given, with what became of it."""
    wanted, given = _calls_or_none(expected), _calls_or_none(answer)
    if not wanted:
        return [(NO_CALL_FIELD, "extra" if given else "right")]
    outcomes: list[tuple[str, Outcome]] = []
    for one, other in zip_longest(wanted, given):
        outcomes += _compared(_fields(one), _fields(other))
    return outcomes


def tool_call(answer: str, expected: str) -> float:
    """1.0 when every call has its name and all its arguments right, and nothing else."""
    return float(all(outcome == "right" for _, outcome in field_outcomes(answer, expected)))


def tool_name(answer: str, expected: str) -> float:
    """1.0 when the right tools are called, whatever their arguments."""
    names = [[name for name, _ in _calls_or_none(text)] for text in (answer, expected)]
    return float(names[0] == names[1])


def tool_fields(answer: str, expected: str) -> float:
    """The share of the fields, wanted or given, that are right."""
    outcomes = field_outcomes(answer, expected)
    return sum(outcome == "right" for _, outcome in outcomes) / len(outcomes)


def field_table(answers: Sequence[str], expected: Sequence[str]) -> dict[str, dict[str, float]]:
    """Counts of each outcome by field over all rows, with `accuracy`, the share that is right; fields that occur most come first."""
    counts: dict[str, Counter[str]] = {}
    for answer, text in zip(answers, expected, strict=True):
        for field, outcome in field_outcomes(answer, text):
            counts.setdefault(field, Counter())[outcome] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    outcomes = ("right", "missing", "extra", "wrong")
    return {field: {**{name: found[name] for name in outcomes}, "accuracy": found["right"] / found.total()} for field, found in ordered}


def first_name(text: str) -> str | None:
    """The tool that a text calls first; None where it calls none."""
    found = _calls_or_none(text)
    return found[0][0] if found else None


def _calls_or_none(text: str) -> list[Call]:
    try:
        return read_calls(text)
    except ValueError:
        return []


def _call(value: Any) -> Call:
    body = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise ValueError("no object with a name")
    arguments = body.get("arguments", body.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return body["name"], arguments


def _fields(call: Call | None) -> dict[str, Any]:
    if call is None:
        return {}
    name, arguments = call
    return {NAME_FIELD: name, **{f"arguments.{key}": value for key, value in arguments.items()}}


def _compared(wanted: dict[str, Any], given: dict[str, Any]) -> Iterable[tuple[str, Outcome]]:
    for field, value in wanted.items():
        if field not in given:
            yield field, "missing"
        else:
            yield field, "right" if same(given[field], value) else "wrong"
    yield from ((field, "extra") for field in given if field not in wanted)
