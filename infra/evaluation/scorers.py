"""Scorers: what one answer is worth against the expected text, from 0 (wrong) to 1 (right).

An answer is a model's, so it may be anything: endless brackets, a number of a million digits, half a sentence.
A scorer gives such text 0 and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infra.errors import ConfigError
from infra.evaluation import json_text
from infra.evaluation.overlap import rouge_l
from infra.evaluation.own_scorer import is_own, load_scorer
from infra.evaluation.tool_calls import tool_call, tool_fields, tool_name

Scorer = Callable[[str, str], float]


def exact_match_json(answer: str, expected: str) -> float:
    """1.0 when both texts are JSON of the same value: keys in any order, 1 equal to 1.0, true not equal to 1."""
    try:
        return float(json_text.same(json_text.parse(answer), json_text.parse(expected)))
    except ValueError:
        return 0.0


def valid_json(answer: str, expected: str) -> float:
    """1.0 when the answer is one JSON value and nothing else; `expected` is not looked at."""
    try:
        json_text.parse(answer)
    except ValueError:
        return 0.0
    return 1.0


def exact_match_text(answer: str, expected: str) -> float:
    """1.0 when the texts are the same but for white space around them."""
    return float(answer.strip() == expected.strip())


SCORERS: dict[str, Scorer] = {
    "accuracy": exact_match_text,
    "exact_match_json": exact_match_json,
    "exact_match_text": exact_match_text,
    "rouge_l": rouge_l,
    "tool_call": tool_call,
    "tool_fields": tool_fields,
    "tool_name": tool_name,
    "valid_json": valid_json,
}


def find_scorer(name: str) -> Scorer:
    """The scorer of that name or dotted path. Raises ConfigError where there is none."""
    if is_own(name):
        return load_scorer(name)
    if name not in SCORERS:
        raise ConfigError(
            f"Scorer {name!r} is unknown. Use one of: {', '.join(sorted(SCORERS))}; or a function of your own as package.module:function."
        )
    return SCORERS[name]


def score_rows(answers: Sequence[str], expected: Sequence[str], scorer_name: str) -> list[float]:
    """The score of each answer against the expected text of the same row.

    Raises:
        ConfigError: the scorer is unknown, or the two sequences differ in length.
    """
    scorer = find_scorer(scorer_name)
    if len(answers) != len(expected):
        raise ConfigError(
            f"Found {len(answers)} answers for {len(expected)} expected texts. Each row needs one of both: answer all rows again."
        )
    return [scorer(answer, text) for answer, text in zip(answers, expected, strict=True)]
