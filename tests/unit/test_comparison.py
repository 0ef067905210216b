"""Two models on the same rows, asked once and asked twice, and the parts of the rows that are looked at."""

from __future__ import annotations

import random
from typing import Any

import pytest

from infra.answers import Answer, Prompt
from infra.errors import ConfigError
from infra.evaluation.comparison import compare, told_together, verdict
from infra.evaluation.hypotheses import mcnemar_exact
from infra.evaluation.metrics import Row, find_metric
from infra.evaluation.noise import noise_floor, told
from infra.evaluation.slices import slice_rows
from infra.evaluation.statistics import Interval, paired_difference

EXACT = find_metric("exact_match_text")


def binary(n: int, worse: int, better: int = 0) -> tuple[list[float], list[float]]:
    """Scores of a model that loses `worse` rows against its reference and wins `better`."""
    return [0.0] * worse + [1.0] * (n - worse), [1.0] * (n - better) + [0.0] * better


def test_compare_scores_of_zero_and_one_takes_mcnemar_and_agresti() -> None:
    model, reference = binary(300, worse=6, better=1)
    found = compare(EXACT, "int8", "adapter", model, reference, 0.95)
    assert found.loss == paired_difference(reference, model)
    assert found.loss.value == pytest.approx(5 / 300)
    assert (found.test, found.p) == ("mcnemar", mcnemar_exact(model, reference))
    assert found.bootstrap.low < found.loss.value < found.bootstrap.high


def test_compare_of_what_is_better_when_lower_counts_more_as_a_loss() -> None:
    latency = find_metric("latency_s")
    rng = random.Random(2)
    fast = [rng.uniform(0.1, 0.2) for _ in range(60)]
    found = compare(latency, "slow", "fast", [value + 0.05 for value in fast], fast, 0.95)
    assert found.loss.value == pytest.approx(0.05)
    assert found.loss.low > 0
    assert (found.test, found.p) == ("randomization", 1 / 2001)


def test_compare_of_a_pooled_figure_without_any_difference_keeps_a_width() -> None:
    pairs = [("a", "a"), ("b", "b"), ("a", "b")] * 10
    found = compare(find_metric("macro_f1"), "one", "other", pairs, pairs, 0.95)
    assert found.loss.value == 0
    assert found.loss.low < 0 < found.loss.high
    assert found.p == 1.0
    assert found.rows_to_differ is None


def test_told_together_adjusts_for_the_number_of_metrics_and_judges_margins() -> None:
    worse = compare(EXACT, "int4", "adapter", *binary(300, worse=12, better=3), 0.95)
    alike = compare(find_metric("valid_json"), "int4", "adapter", *binary(300, worse=0), 0.95)
    assert 0.025 < worse.p < 0.05
    (alone,) = told_together([worse], {}, 0.95)
    assert (alone["finding"], alone["p_adjusted"]) == ("worse", worse.p)
    first, second = told_together([worse, alike], {"exact_match_text": 0.02, "valid_json": 0.02}, 0.95)
    assert first["p_adjusted"] == pytest.approx(2 * worse.p)
    assert (first["finding"], first["verdict"], first["rows_for_margin"]) == ("no difference shown", "undecided", None)
    assert (second["finding"], second["verdict"]) == ("no difference shown", "non-inferior")
    assert second["rows_for_margin"] < 300
    assert "margin" not in alone


def test_told_together_rows_for_margin_would_indeed_decide() -> None:
    (found,) = told_together([compare(EXACT, "int8", "adapter", *binary(100, worse=2, better=1), 0.95)], {"exact_match_text": 0.02}, 0.95)
    assert found["verdict"] == "undecided"
    scale = found["rows_for_margin"] // 100 + 1
    (again,) = told_together(
        [compare(EXACT, "int8", "adapter", *binary(100 * scale, worse=2 * scale, better=scale), 0.95)], {"exact_match_text": 0.02}, 0.95
    )
    assert again["verdict"] == "non-inferior"


@pytest.mark.parametrize(("low", "high", "said"), [(-0.01, 0.02, "non-inferior"), (0.01, 0.03, "undecided"), (0.021, 0.03, "inferior")])
def test_verdict_reads_the_whole_interval(low: float, high: float, said: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 100), 0.02) == said


# -- noise -----------------------------------------------------------------------------------------------------------------------------


def rows(*texts: str) -> list[Row]:
    return [Row("yes", Answer(row=at, ids=(1,), text=text, finish_reason="stop", latency_s=at + 1.0)) for at, text in enumerate(texts)]


def test_noise_floor_of_the_same_answers_is_zero_and_says_so() -> None:
    found = noise_floor([EXACT, find_metric("macro_f1")], rows("yes", "no"), rows("yes", "no"), 300, 0.95)
    assert found == {"rows": 2, "differing": 0, "floor": {"exact_match_text": 0.0, "macro_f1": 0.0}}
    assert told(found) == "deterministic: 2 rows answered twice, all alike"


def test_noise_floor_of_other_answers_is_what_they_move_over_all_rows() -> None:
    first, second = rows(*["yes"] * 50), rows("no", "no", *["yes"] * 48)
    found = noise_floor([EXACT, find_metric("latency_s")], first, second, 200, 0.95)
    assert found["differing"] == 2
    # 1.96 * sqrt(2/50 / 200); seconds are never alike and have no floor.
    assert found["floor"] == {"exact_match_text": pytest.approx(1.959964 * (0.04 / 200) ** 0.5)}
    assert told(found) == "2 of 50 rows answered otherwise the second time"


def test_noise_floor_holds_the_difference_of_two_simulated_runs_as_often_as_promised() -> None:
    rng = random.Random(9)

    def run(n: int) -> list[float]:
        return [1.0 if at >= n // 10 else float(rng.random() < 0.5) for at in range(n)]  # a tenth of the rows is a toss

    def asked_twice(n: int) -> Any:
        one, two = (rows(*("yes" if score else "no" for score in run(n))) for _ in range(2))
        return noise_floor([EXACT], one, two, 300, 0.95)["floor"]["exact_match_text"]

    floor = asked_twice(1000)
    within = sum(abs(sum(run(300)) - sum(run(300))) / 300 <= floor for _ in range(400)) / 400
    assert within == pytest.approx(0.95, abs=0.035)


def test_noise_floor_of_other_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 and 1 rows"):
        noise_floor([EXACT], rows("a", "b"), rows("a"), 10, 0.95)


# -- slices ----------------------------------------------------------------------------------------------------------------------------


def prompt(row: int, expected: str = "x", length: int = 1, **facts: str) -> Prompt:
    return Prompt(row=row, ids=(1,) * length, expected=expected, **facts)


def test_slice_rows_finds_own_slices_tools_lengths_and_languages() -> None:
    on, off = '{"name":"on","arguments":{}}', '{"name":"off"}'
    prompts = [
        prompt(0, on, 5, slice="seen_template", language="de"),
        prompt(1, off, 9, slice="unseen_template", language="en"),
        prompt(2, "hello", 20, language="de"),
    ]
    assert slice_rows(prompts) == {
        "seen_template": [0],
        "unseen_template": [1],
        "tool=off": [1],
        "tool=on": [0],
        "length=long": [2],
        "length=medium": [1],
        "length=short": [0],
        "language=de": [0, 2],
        "language=en": [1],
    }
    assert list(slice_rows(prompts, ("language",))) == ["seen_template", "unseen_template", "language=de", "language=en"]


def test_slice_rows_lengths_are_terciles_and_equal_lengths_stay_together() -> None:
    prompts = [prompt(at, length=length) for at, length in enumerate([3] * 5 + [7] + [9] * 6)]
    found = slice_rows(prompts, ("length",))
    assert {name: len(places) for name, places in found.items()} == {"length=short": 5, "length=medium": 7}
    assert sorted(place for places in found.values() for place in places) == list(range(12))


def test_slice_rows_kind_that_holds_all_rows_in_one_is_left_out() -> None:
    assert slice_rows([prompt(at, '{"name":"on"}', language="en") for at in range(4)]) == {}
    assert slice_rows([prompt(0)]) == {}
    assert slice_rows([]) == {}
