"""Scores, certificate and gates from answers made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infra.answers import Answer, ExpectedLogprob, Prompt, read_answers, read_expected, write_answers, write_expected
from infra.errors import ArtifactError, ConfigError
from pipelines.spec import EvaluateConfig, GatesConfig
from pipelines.steps.evaluate import score_model
from pipelines.steps.gate import decide
from pipelines.steps.prove import ProveConfig, compare

PROMPTS = [Prompt(row=row, ids=(1,), expected='{"a":1}', slice="seen" if row < 2 else "unseen") for row in range(4)]


def answers(*texts: str) -> list[Answer]:
    return [Answer(row=row, ids=(1,), text=text, finish_reason="stop") for row, text in enumerate(texts)]


def test_score_model_gives_each_metric_over_all_rows_and_each_slice() -> None:
    scores = score_model(PROMPTS, answers('{"a":1}', '{ "a" : 1 }', '{"a":2}', "no"), EvaluateConfig())
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
        score_model(PROMPTS, answers("x"), EvaluateConfig())


def test_compare_counts_rows_answered_alike_and_lists_the_others() -> None:
    config = ProveConfig(metric="exact_match_json", confidence=0.95)
    found = compare(PROMPTS, answers('{"a":1}', '{"a":1}', "x", "x"), answers('{"a":1}', '{"a":2}', "x", "x"), config)
    assert found["same_answer"]["value"] == 0.75
    assert found["num_differing"] == 1
    assert found["differing"] == [{"row": 1, "reference": '{"a":1}', "other": '{"a":2}', "expected": '{"a":1}'}]
    assert found["score_change"]["value"] == -0.25


def scores(base: float, adapter: float, merged: float, served: float) -> dict[str, Any]:
    values = {"base": base, "adapter": adapter, "merged": merged, "int8": served}
    return {name: {"em": {"value": value}, "em/unseen": {"value": value / 2}} for name, value in values.items()}


def outcome(config: GatesConfig, measured: dict[str, Any], agreement: float = 1.0) -> dict[str, bool]:
    certificate = {"reference": "adapter", "models": {"merged": {"same_answer": {"value": agreement}}}}
    return {gate["name"]: gate["passed"] for gate in decide(config, measured, certificate, "int8", "em")}


def test_gates_at_their_exact_thresholds_pass() -> None:
    config = GatesConfig(
        min_score=0.96, min_gain=0.9, max_quantization_drop=0.02, min_merge_agreement=0.99, min_slice_scores={"unseen": 0.48}
    )
    assert all(outcome(config, scores(0.06, 0.98, 1.0, 0.96), 0.99).values())


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"min_score": 0.97}, "em of int8"),
        ({"min_gain": 0.91}, "gain of int8 over base"),
        ({"max_quantization_drop": 0.019}, "drop by quantization"),
        ({"min_merge_agreement": 0.995}, "rows answered alike by adapter and merged"),
        ({"min_slice_scores": {"unseen": 0.49}}, "em of int8 on slice unseen"),
        ({"min_slice_scores": {"typo": 0.0}}, "em of int8 on slice typo"),
    ],
)
def test_gate_just_beyond_its_threshold_alone_refuses(change: dict[str, Any], refused: str) -> None:
    found = outcome(GatesConfig(**{"min_score": 0.5, **change}), scores(0.06, 0.98, 0.98, 0.96), 0.99)
    assert [name for name, passed in found.items() if not passed] == [refused]


def test_gates_of_full_fine_tuning_compare_with_the_merged_model() -> None:
    measured = scores(0.06, 0.0, 0.98, 0.96)
    del measured["adapter"]
    certificate = {"reference": "merged", "models": {"int8": {"same_answer": {"value": 1.0}}}}
    gates = {gate["name"]: gate["passed"] for gate in decide(GatesConfig(max_quantization_drop=0.01), measured, certificate, "int8", "em")}
    assert gates == {"em of int8": True, "gain of int8 over base": True, "drop by quantization": False}


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
