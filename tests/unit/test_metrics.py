"""Metrics and what lies behind them, from answers made by hand."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix, f1_score

from infra.answers import Answer, ExpectedLogprob
from infra.errors import ConfigError
from infra.evaluation.labels import confusion, macro_f1
from infra.evaluation.metrics import Row, find_metric, measure, metric_names
from infra.evaluation.own_scorer import source_digest
from infra.evaluation.scorers import score_rows
from infra.evaluation.statistics import wilson_interval
from infra.evaluation.tool_calls import field_outcomes, field_table, first_name, tool_call, tool_fields, tool_name

CALL = '{"name":"HassTurnOn","arguments":{"area":"kitchen","level":40}}'


def row(text: str, expected: str, **facts: Any) -> Row:
    logprob = facts.pop("logprob", None)
    return Row(expected, Answer(row=0, ids=(1,), text=text, **({"finish_reason": "stop"} | facts)), logprob)


def figure(name: str, rows: list[Row]) -> float:
    metric = find_metric(name)
    return metric.pool([metric.observe(each) for each in rows])


# -- tool calls ------------------------------------------------------------------------------------------------------------------------


def test_field_outcomes_name_each_kind_of_fault() -> None:
    answer = '{"name":"HassTurnOff","arguments":{"area":"kitchen","floor":"first"}}'
    assert field_outcomes(answer, CALL) == [
        ("name", "wrong"),
        ("arguments.area", "right"),
        ("arguments.level", "missing"),
        ("arguments.floor", "extra"),
    ]
    assert (tool_fields(answer, CALL), tool_call(answer, CALL), tool_name(answer, CALL)) == (0.25, 0.0, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        '{"arguments":{"level":40.0,"area":"kitchen"},"name":"HassTurnOn"}',
        '<tool_call>\n{"name":"HassTurnOn","parameters":{"area":"kitchen","level":40}}\n</tool_call>',
        '[{"type":"function","function":{"name":"HassTurnOn","arguments":"{\\"area\\":\\"kitchen\\",\\"level\\":40}"}}]',
    ],
)
def test_tool_call_other_ways_of_writing_it_are_right(answer: str) -> None:
    assert tool_call(answer, CALL) == tool_name(answer, CALL) == tool_fields(answer, CALL) == 1.0


def test_tool_call_types_of_arguments_count() -> None:
    assert field_outcomes(CALL.replace("40", '"40"'), CALL)[-1] == ("arguments.level", "wrong")
    assert field_outcomes(CALL.replace("40", "true"), CALL.replace("40", "1"))[-1] == ("arguments.level", "wrong")


@pytest.mark.parametrize(
    "answer", ["", "I turn it on", "[1]", '{"name":3}', '{"name":"HassTurnOn","arguments":[1]}', "<tool_call>{</tool_call>"]
)
def test_tool_call_text_that_is_none_misses_every_field(answer: str) -> None:
    assert {outcome for _, outcome in field_outcomes(answer, CALL)} == {"missing"}
    assert (tool_call(answer, CALL), tool_fields(answer, CALL)) == (0.0, 0.0)


def test_tool_call_where_none_is_expected_is_wrong_and_none_is_right() -> None:
    assert field_outcomes("Hello", "Good day") == [("(no call)", "right")]
    assert field_outcomes(CALL, "Good day") == [("(no call)", "extra")]


def test_field_outcomes_several_calls_are_compared_in_order_and_a_lacking_one_misses() -> None:
    two = '<tool_call>{"name":"a","arguments":{}}</tool_call><tool_call>{"name":"b","arguments":{"x":1}}</tool_call>'
    assert field_outcomes('{"name":"a"}', two) == [("name", "right"), ("name", "missing"), ("arguments.x", "missing")]
    assert field_outcomes(two, '{"name":"a"}') == [("name", "right"), ("name", "extra"), ("arguments.x", "extra")]


def test_field_table_counts_over_rows() -> None:
    table = field_table([CALL, CALL.replace("40", "41"), "no"], [CALL, CALL, CALL])
    assert table["arguments.level"] == {"right": 1, "missing": 1, "extra": 0, "wrong": 1, "accuracy": 1 / 3}
    assert table["name"]["accuracy"] == 2 / 3


def test_first_name_is_the_tool_or_none() -> None:
    assert (first_name(CALL), first_name("on"), first_name('{"a":1}')) == ("HassTurnOn", None, None)


# -- labels ----------------------------------------------------------------------------------------------------------------------------


def test_macro_f1_agrees_with_scikit_learn_and_nonsense_is_no_label() -> None:
    rng = random.Random(5)
    wanted = rng.choices("abc", (6, 3, 1), k=200)
    given = [one if rng.random() < 0.7 else rng.choice(["a", "b", "c", f"nonsense {rng.random()}"]) for one in wanted]
    expected = f1_score(wanted, given, labels=["a", "b", "c"], average="macro")
    assert macro_f1(list(zip(wanted, given, strict=True))) == pytest.approx(expected)
    assert figure("macro_f1", [row(f" {two}\n", one) for one, two in zip(wanted, given, strict=True)]) == pytest.approx(expected)


def test_confusion_agrees_with_scikit_learn_and_gathers_the_rest() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "?"), ("a", "a")]
    found = confusion(pairs)
    assert found["labels"] == ["a", "b", "(other)"]
    known = [(one, other if other in "ab" else "(other)") for one, other in pairs]
    assert found["counts"] == confusion_matrix(*zip(*known, strict=True), labels=found["labels"]).tolist()


def test_confusion_more_labels_than_are_shown_are_gathered() -> None:
    found = confusion([(f"label {number:02}", f"label {number:02}") for number in range(40)])
    assert len(found["labels"]) == 31
    assert found["counts"][-1][-1] == 10


# -- overlap ---------------------------------------------------------------------------------------------------------------------------


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score", reason="comes with the extra evaluate")
    # Three of three words of the answer, three of four of the expected text: 2 * 1 * 0.75 / 1.75.
    assert score_rows(["The cat, sat"], ["the cat sat down"], "rouge_l") == pytest.approx([6 / 7])
    assert score_rows(["сегодня хорошо", ""], ["сегодня плохо", "x"], "rouge_l") == pytest.approx([0.5, 0.0])


def test_bleu_of_rows_is_the_corpus_bleu_of_the_library() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="comes with the extra evaluate")
    answers = ["the cat sat on the mat", "it is raining in the old town today", "no"]
    expected = ["the cat sat on a mat", "it is raining in the old city today", "yes indeed"]
    rows = [row(one, two) for one, two in zip(answers, expected, strict=True)]
    assert figure("bleu", rows) == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score / 100)
    metric = find_metric("bleu")
    interval = measure(metric, [metric.observe(each) for each in rows], 0.95)
    assert 0 <= interval.low < interval.value < interval.high <= 1


def test_metric_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.evaluation.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sacrebleu.*slipway-ml\[evaluate\]"):
        find_metric("bleu")


# -- what is not a text ----------------------------------------------------------------------------------------------------------------


def test_stop_rate_counts_answers_that_ended_by_themselves() -> None:
    assert figure("stop_rate", [row("a", "a"), row("b", "b", finish_reason="length")]) == 0.5


def test_perplexity_weighs_tokens_and_is_that_of_the_distribution() -> None:
    # Each token one of four, whatever the length of its row.
    rows = [row("", "", logprob=ExpectedLogprob(row=0, logprob_sum=n * math.log(0.25), num_tokens=n)) for n in (1, 3, 20)]
    assert figure("perplexity", rows) == pytest.approx(4.0)
    mixed = [ExpectedLogprob(row=0, logprob_sum=-9.0, num_tokens=9), ExpectedLogprob(row=1, logprob_sum=-1.0, num_tokens=1)]
    mixed += [ExpectedLogprob(row=2, logprob_sum=-8.0, num_tokens=2)]
    interval = measure(find_metric("perplexity"), mixed, 0.95)
    assert interval.value == pytest.approx(math.exp(18 / 12))
    assert 1 < interval.low < interval.value < interval.high


def test_latency_and_perplexity_that_no_row_carries_are_not_observed() -> None:
    assert [find_metric(name).observe(row("a", "a")) for name in ("latency_s", "perplexity")] == [None, None]
    assert find_metric("latency_s").observe(row("a", "a", latency_s=0.25)) == 0.25


def test_measure_of_a_pooled_figure_without_a_fault_keeps_the_doubt_of_few_rows() -> None:
    pairs = [("a", "a")] * 10 + [("b", "b")] * 10
    assert measure(find_metric("macro_f1"), pairs, 0.95) == wilson_interval(20, 20)


def test_find_metric_unknown_names_all_known() -> None:
    with pytest.raises(ConfigError) as caught:
        find_metric("exact")
    assert "'exact'" in caught.value.message
    for name in metric_names():
        assert name in caught.value.message


# -- scorers of one's own --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of scorers, importable while the test runs."""
    path = tmp_path / "own_scorers_of_a_test.py"
    path.write_text(
        "def share(answer, expected):\n    return min(1, len(answer) / max(len(expected), 1))\n"
        "def too_much(answer, expected):\n    return len(answer)\n"
        "def fails(answer, expected):\n    return 1 / len(answer)\n"
        "def nothing(answer, expected):\n    return None\n"
        "def later(answer, expected):\n    return 2 if answer == 'late' else 1\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop(path.stem, None)


def test_own_scorer_scores_rows(own: Path) -> None:
    assert score_rows(["ab", "abcd"], ["abcd", "abcd"], f"{own.stem}:share") == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_much", "gives 3"),
        ("fails", "raises ZeroDivisionError"),
        ("nothing", "gives None"),
        ("number", "is a int"),
        ("absent", "cannot be imported"),
    ],
)
def test_own_scorer_that_cannot_be_used_is_refused_when_it_is_named(own: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{own.stem}:{name}.*{message}"):
        find_metric(f"{own.stem}:{name}")


def test_own_scorer_that_fails_on_an_answer_later_names_it(own: Path) -> None:
    with pytest.raises(ConfigError, match="gives 2, given answer 'late'"):
        score_rows(["early", "late"], ["x", "x"], f"{own.stem}:later")


def test_own_scorer_changed_source_has_another_digest(own: Path) -> None:
    before = source_digest(f"{own.stem}:share")
    assert before == source_digest(f"{own.stem}:share")
    own.write_text(own.read_text() + "# changed\n")
    assert source_digest(f"{own.stem}:share") != before
