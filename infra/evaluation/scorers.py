"""Scorers: what one answer is worth against the expected text, from 0 (wrong) to 1 (right).

An answer is a model's, so it may be anything: endless brackets, a number of a million digits, half a sentence.
A scorer gives such text 0 and never raises.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from infra.errors import ConfigError

MAX_JSON_CHARS = 1 << 16
MAX_JSON_DEPTH = 64

Scorer = Callable[[str, str], float]

# The closing quote is optional, so that an unfinished string is passed over once and not tried again at each quote in it.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)


def exact_match_json(answer: str, expected: str) -> float:
    """1.0 when both texts are JSON of the same value: keys in any order, 1 equal to 1.0, true not equal to 1."""
    try:
        return float(_same(_parse(answer), _parse(expected)))
    except ValueError:
        return 0.0


def valid_json(answer: str, expected: str) -> float:
    """1.0 when the answer is one JSON value and nothing else; `expected` is not looked at."""
    try:
        _parse(answer)
    except ValueError:
        return 0.0
    return 1.0


def exact_match_text(answer: str, expected: str) -> float:
    """1.0 when the texts are the same but for white space around them."""
    return float(answer.strip() == expected.strip())


SCORERS: dict[str, Scorer] = {
    "exact_match_json": exact_match_json,
    "exact_match_text": exact_match_text,
    "valid_json": valid_json,
}


def score_rows(answers: Sequence[str], expected: Sequence[str], scorer_name: str) -> list[float]:
    """The score of each answer against the expected text of the same row.

    Raises:
        ConfigError: the scorer is unknown, or the two sequences differ in length.
    """
    if scorer_name not in SCORERS:
        raise ConfigError(f"Scorer {scorer_name!r} is unknown. Use one of: {', '.join(sorted(SCORERS))}.")
    if len(answers) != len(expected):
        raise ConfigError(
            f"Found {len(answers)} answers for {len(expected)} expected texts. Each row needs one of both: answer all rows again."
        )
    scorer = SCORERS[scorer_name]
    return [scorer(answer, text) for answer, text in zip(answers, expected, strict=True)]


def _parse(text: str) -> Any:
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


def _same(first: Any, second: Any) -> bool:
    """Equality of JSON values; Python's own would take true for 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)
