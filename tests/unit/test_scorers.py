from __future__ import annotations

import json
import time

import pytest

from infra.errors import ConfigError
from infra.evaluation.json_text import MAX_JSON_CHARS, MAX_JSON_DEPTH
from infra.evaluation.scorers import SCORERS, exact_match_json, exact_match_text, score_rows, valid_json

CALL = '{"name":"HassTurnOn","arguments":{"area":"kitchen","level":40}}'

HOSTILE = {
    "open brackets": "[" * 60_000,
    "open objects": '{"a":' * 12_000,
    "nested beyond the bound": "[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1),
    "escaped quotes without end": '"\\' * 30_000,
    "quotes": '"' * 60_000,
    "lone backslash": '"\\',
    "million digits": "1" * 60_000,
    "digits past int()": '{"a":' + "9" * 5_000 + "}",
    "infinity by exponent": "1e999",
    "NaN": '{"a":NaN}',
    "minus infinity": "-Infinity",
    "duplicate key": '{"a":1,"a":1}',
    "duplicate key below": '[{"b":{"a":1,"a":2}}]',
    "text after": '{"a":1} done',
    "fenced": '```json\n{"a":1}\n```',
    "single quotes": "{'a':1}",
    "control character": '"\x00"',
    "too long": " " * MAX_JSON_CHARS + "1",
    "empty": "",
}


def test_exact_match_json_other_key_order_and_spaces_is_right() -> None:
    assert exact_match_json(' { "arguments": {"level": 40, "area": "kitchen"}, "name": "HassTurnOn" }\n', CALL) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        CALL.replace("40", "41"),
        CALL.replace("40", '"40"'),
        CALL.replace("kitchen", "Kitchen"),
        CALL.replace(',"level":40', ""),
        CALL.replace('"level":40', '"level":40,"floor":"first"'),
        f"[{CALL}]",
    ],
)
def test_exact_match_json_other_value_is_wrong(answer: str) -> None:
    assert valid_json(answer, CALL) == 1.0  # so it is the comparison that refuses it
    assert exact_match_json(answer, CALL) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("1", "1.0", 1.0),
        ("true", "1", 0.0),
        ("[false]", "[0]", 0.0),
        ("[1,2]", "[2,1]", 0.0),
        ("[1,2]", "[1,2,3]", 0.0),
        ("null", "0", 0.0),
        ("null", "null", 1.0),
        ('"\\u00e9"', '"é"', 1.0),
    ],
)
def test_exact_match_json_values_of_each_kind_compare_as_json(answer: str, expected: str, score: float) -> None:
    assert exact_match_json(answer, expected) == score


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_json_scorers_hostile_text_is_wrong_and_quick(text: str) -> None:
    started = time.perf_counter()
    assert valid_json(text, CALL) == 0.0
    assert exact_match_json(text, text) == 0.0  # even against itself
    # A quadratic scan of the escaped quotes took 27 s; a linear one takes milliseconds.
    assert time.perf_counter() - started < 1.0


def test_valid_json_depth_counts_brackets_outside_strings_only() -> None:
    assert valid_json(json.dumps('"[' * 500), "") == 1.0
    assert valid_json(json.dumps(["]"] * 3), "") == 1.0
    assert valid_json("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH, "") == 1.0


def test_exact_match_text_white_space_around_is_ignored_within_is_not() -> None:
    assert exact_match_text(" yes sir\n", "yes sir") == 1.0
    assert exact_match_text("yes  sir", "yes sir") == 0.0
    assert exact_match_text("Yes sir", "yes sir") == 0.0


def test_score_rows_each_answer_meets_its_own_row() -> None:
    assert score_rows(["1", "2", "oops"], ["1", "1", "1"], "exact_match_json") == [1.0, 0.0, 0.0]
    assert score_rows(["1", "2", "oops"], ["1", "1", "1"], "valid_json") == [1.0, 1.0, 0.0]


def test_score_rows_unknown_scorer_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        score_rows(["1"], ["1"], "exact_match")
    assert "'exact_match'" in caught.value.message
    for name in SCORERS:
        assert name in caught.value.message


def test_score_rows_unequal_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 answers for 1 expected"):
        score_rows(["1", "2"], ["1"], "valid_json")
