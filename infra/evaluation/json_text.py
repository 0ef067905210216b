"""JSON as a model writes it, read strictly and in bounded time and depth.

An answer may be anything: endless brackets, a number of a million digits, half a sentence. Such text raises ValueError and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_JSON_CHARS = 1 << 16
MAX_JSON_DEPTH = 64

# The closing quote is optional, so that an unfinished string is passed over once and not tried again at each quote in it.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)


def parse(text: str) -> Any:
    """The JSON value of `text`; raises ValueError when it is none, too long, too deep, or would be read in two ways.

    An integer of more digits than int() reads is a ValueError too.
    """
    if len(text) > MAX_JSON_CHARS:
        raise ValueError(f"{len(text)} characters; at most {MAX_JSON_CHARS} are read")
    _check_depth(text)
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)


def _check_depth(text: str) -> None:
    """Counts brackets outside strings before parsing, since the parser itself recurses."""
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} brackets deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value


def same(first: Any, second: Any) -> bool:
    """Equality of JSON values; Python's own would take true for 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
