"""Scores and certificate from answers made by hand; tests/unit/test_gates.py has the gates."""

from __future__ import annotations

from typing import Any

import pytest

from infra.answers import Answer, ExpectedLogprob, Prompt, read_answers, read_expected, write_answers, write_expected
from infra.errors import ArtifactError, ConfigError
from infra.evaluation.metrics import find_metric
from pipelines.measures import EvaluateConfig
from pipelines.spec import ProveConfig
from pipelines.steps.evaluate import as_rows, score_model
from pipelines.steps.prove import ProveIdentity, compare

METRICS = [find_metric(name) for name in EvaluateConfig().metrics]
PROMPTS = [Prompt(row=row, ids=(1,), expected='{"a":1}', slice="seen" if row < 2 else "unseen") for row in range(4)]


def answers(*texts: str) -> list[Answer]:
    return [Answer(row=row, ids=(1,), text=text, finish_reason="stop") for row, text in enumerate(texts)]


def test_score_model_gives_each_metric_over_all_rows_and_each_slice() -> None:
    scores = score_model(PROMPTS, as_rows(PROMPTS, answers('{"a":1}', '{ "a" : 1 }', '{"a":2}', "no")), METRICS, EvaluateConfig())
    assert {key: (score["value"], score["n"]) for key, score in scores.items()} == {
        "exact_match_json": (0.5, 4),
        "exact_match_json/seen": (1.0, 2),
        "exact_match_json/unseen": (0.0, 2),
        "valid_json": (0.75, 4),
        "valid_json/seen": (1.0, 2),
        "valid_json/unseen": (0.5, 2),
    }
    assert scores["exact_match_json"]["low"] < 0.5 < scores["exact_match_json"]["high"]


def test_score_model_with_an_answer_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="4"):
        score_model(PROMPTS, as_rows(PROMPTS, answers("x")), METRICS, EvaluateConfig())


def test_compare_counts_rows_answered_alike_and_lists_the_others() -> None:
    config = ProveIdentity(metric="exact_match_json", confidence=0.95, max_new_tokens=8, prove=ProveConfig(), precision="f32")
    found = compare(PROMPTS, answers('{"a":1}', '{"a":1}', "x", "x"), answers('{"a":1}', '{"a":2}', "x", "x"), config)
    assert found["same_answer"]["value"] == 0.75
    assert found["num_differing"] == 1
    assert found["differing"] == [{"row": 1, "reference": '{"a":1}', "other": '{"a":2}', "expected": '{"a":1}'}]
    assert found["score_change"]["value"] == -0.25


def test_answers_survive_their_file_and_a_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ArtifactError, match=r"answers\.jsonl"):
        read_answers(tmp_path)
    made = [Answer(row=0, ids=(5, 6), text='zwei\u2028Zeilen\n"', finish_reason="length")]
    write_answers(tmp_path, made)
    assert read_answers(tmp_path) == made
    assert "latency_s" not in (tmp_path / "answers.jsonl").read_text()


def test_expected_logprobs_survive_their_file_and_are_never_above_zero(tmp_path: Any) -> None:
    made = [ExpectedLogprob(row=0, logprob_sum=-1.25, num_tokens=3), ExpectedLogprob(row=1, logprob_sum=0.0, num_tokens=1)]
    write_expected(tmp_path, made)
    assert read_expected(tmp_path) == made
    with pytest.raises(ValueError, match="logprob_sum"):
        ExpectedLogprob(row=0, logprob_sum=0.5, num_tokens=1)
