"""Gates at their thresholds and beyond, from figures made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infra.config import parse
from infra.errors import ConfigError
from infra.evaluation.comparison import compare, told_together
from infra.evaluation.metrics import find_metric
from infra.evaluation.statistics import Interval
from infra.evaluation.tasks import TaskFigure, task_comparisons
from pipelines.gates import Evidence
from pipelines.measures import GatesConfig, MetricGate
from pipelines.spec import Spec
from pipelines.steps.gate import decide


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


def decided(config: GatesConfig, measured: dict[str, Any], evidence: Evidence | None = None) -> dict[str, dict[str, Any]]:
    certificate = {"reference": "adapter", "models": {"merged": {"same_answer": {"value": 1.0}}}}
    return {gate["name"]: gate for gate in decide(config, measured, certificate, "int8", "em", evidence)}


def compared(worse: int, better: int, n: int = 300, margin: float = 0.02) -> list[dict[str, Any]]:
    """comparisons.json of a candidate that loses and wins so many rows against the adapter."""
    mine, theirs = [0.0] * worse + [1.0] * (n - worse), [1.0] * (n - better) + [0.0] * better
    found = compare(find_metric("accuracy"), "int8", "adapter", mine, theirs, 0.95)
    told = told_together([found], {"accuracy": margin}, 0.95)
    return [each | {"metric": "em"} for each in told]


def test_refusal_says_by_how_much_and_what_to_try() -> None:
    gates = decided(GatesConfig(min_score=0.97), scores(0.06, 0.98, 0.98, 0.96))
    assert gates["em of int8"]["detail"] == (
        "0.960, at least 0.970 needed: 0.010 too low. Train on more rows or longer (train.epochs), or lower gates.min_score."
    )
    assert gates["gain of int8 over base"]["detail"] == "0.900, at least 0.000 needed"


def test_drop_of_the_demo_passes_as_non_inferior() -> None:
    # 0.983 against 0.987 of 300 rows: one row lost.
    gates = decided(GatesConfig(), scores(0.0, 0.987, 0.987, 0.983), Evidence(comparisons=compared(1, 0)))
    assert gates["drop by quantization"]["passed"]
    assert gates["drop by quantization"]["detail"] == "0.004 [-0.006, 0.012] on 300 rows, at most 0.020 allowed: non-inferior"


def test_drop_that_is_small_but_not_proven_passes_by_estimate_and_not_by_interval() -> None:
    measured, evidence = scores(0.0, 0.98, 0.98, 0.965), Evidence(comparisons=compared(8, 3, margin=0.02))
    by_estimate = decided(GatesConfig(), measured, evidence)["drop by quantization"]
    assert by_estimate["passed"]
    assert "undecided, " in by_estimate["detail"]
    by_interval = decided(GatesConfig(margin_by="interval"), measured, evidence)["drop by quantization"]
    assert not by_interval["passed"]
    assert "not proven, the interval ends 0.019 beyond it" in by_interval["detail"]
    assert "rows would show it" in by_interval["detail"]


def test_drop_that_is_proven_passes_by_interval() -> None:
    config = GatesConfig(margin_by="interval")
    assert decided(config, scores(0.0, 0.98, 0.98, 0.977), Evidence(comparisons=compared(1, 0)))["drop by quantization"]["passed"]
    assert not decided(config, scores(0.0, 0.98, 0.98, 0.98))["drop by quantization"]["passed"]  # nobody compared them


@pytest.mark.parametrize(("worse", "doubt"), [(10, True), (40, False)])
def test_drop_beyond_the_margin_is_refused_with_its_doubt(worse: int, doubt: bool) -> None:
    measured = scores(0.0, 0.99, 0.99, 0.99 - worse / 300)
    gate = decided(GatesConfig(min_score=0), measured, Evidence(comparisons=compared(worse, 0)))["drop by quantization"]
    assert not gate["passed"]
    assert f"{worse / 300 - 0.02:.3f} too much" in gate["detail"]
    assert ("which may be chance" in gate["detail"]) is doubt
    assert "quantize.formats" in gate["detail"]


def test_drop_within_the_noise_floor_is_no_drop() -> None:
    measured = scores(0.0, 0.98, 0.98, 0.955)
    noise = {"rows": 32, "differing": 3, "floor": {"em": 0.03}}
    gate = decided(GatesConfig(), measured, Evidence(noise=noise))["drop by quantization"]
    assert gate["passed"]
    assert "within the noise floor of 0.030 (3 of 32 rows answered otherwise the second time)" in gate["detail"]
    assert not decided(GatesConfig(), measured, Evidence(noise=noise | {"floor": {"em": 0.02}}))["drop by quantization"]["passed"]


def test_drop_of_one_format_may_have_a_margin_of_its_own() -> None:
    measured = scores(0.0, 0.98, 0.98, 0.955)
    assert not decided(GatesConfig(), measured)["drop by quantization"]["passed"]
    assert decided(GatesConfig(max_quantization_drops={"int8": 0.03}), measured)["drop by quantization"]["passed"]
    assert not decided(GatesConfig(max_quantization_drops={"int4": 0.03}), measured)["drop by quantization"]["passed"]


def sliced(**values: tuple[float, int]) -> dict[str, Any]:
    measured = scores(0.0, 0.98, 0.98, 0.96)
    measured["int8"] = {"em": {"value": 0.96}, **{f"em/tool={name}": {"value": value, "n": n} for name, (value, n) in values.items()}}
    return measured


def test_worst_slice_decides_and_a_tiny_one_does_not() -> None:
    config = GatesConfig(min_worst_slice_score=0.8, min_slice_rows=20)
    name = "em of int8 on its worst slice"
    passed = decided(config, sliced(on=(0.95, 30), off=(0.85, 20), rare=(0.0, 19)))[name]
    assert passed["passed"]
    assert passed["detail"] == "tool=off of 20 rows: 0.850, at least 0.800 needed"
    refused = decided(config, sliced(on=(0.95, 30), off=(0.7, 40)))[name]
    assert not refused["passed"]
    assert refused["detail"].startswith("tool=off of 40 rows: 0.700, at least 0.800 needed: 0.100 too low.")
    unmeasured = decided(config, sliced(on=(1.0, 5)))[name]
    assert not unmeasured["passed"]
    assert "None of 1 slices has 20 rows" in unmeasured["detail"]
    assert name not in decided(GatesConfig(), sliced(on=(0.0, 100)))


def test_slice_that_does_not_exist_names_those_that_do() -> None:
    gates = decided(GatesConfig(min_slice_scores={"tool=oof": 0.5}), sliced(on=(0.95, 30), off=(0.85, 20)))
    assert "slices are ['tool=on', 'tool=off']" in gates["em of int8 on slice tool=oof"]["detail"]


def test_metric_gates_read_each_metric_in_its_own_direction() -> None:
    measured = {
        name: {"em": {"value": 0.95}, "rouge_l": {"value": rouge}, "perplexity": {"value": surprise}}
        for name, rouge, surprise in (("base", 0.2, 9.0), ("adapter", 0.8, 2.0), ("merged", 0.8, 2.0), ("int8", 0.7, 2.5))
    }
    asked = {"rouge_l": MetricGate(min=0.7, min_gain=0.5, max_loss=0.1), "perplexity": MetricGate(max=2.5, min_gain=6.5, max_loss=0.5)}
    gates = decided(GatesConfig(metrics=asked), measured)
    names = ["rouge_l of int8", "gain in rouge_l of int8 over base", "loss in rouge_l by quantization"]
    names += ["perplexity of int8, upper bound", "gain in perplexity of int8 over base", "loss in perplexity by quantization"]
    assert [gates[name]["passed"] for name in names] == [True] * 6
    tighter = {
        "rouge_l": MetricGate(min=0.71, min_gain=0.51, max_loss=0.09),
        "perplexity": MetricGate(max=2.4, min_gain=6.6, max_loss=0.4),
    }
    gates = decided(GatesConfig(metrics=tighter), measured)
    assert [gates[name]["passed"] for name in names] == [False] * 6
    assert "0.100 too much" in gates["loss in perplexity by quantization"]["detail"]


def test_cost_and_receipt_gates_at_their_thresholds_and_beyond() -> None:
    receipt = {
        "train": {"rows_read": 100, "rows_kept": 98, "tokens_read": 1000, "tokens_kept": 900},
        "heldout": {"rows_read": 10, "rows_kept": 10, "tokens_read": 90, "tokens_kept": 90},
    }
    evidence = Evidence(receipt=receipt, size_bytes=150_000_000, latency_s=Interval(0.4, 0.3, 0.5, 32))
    measured = scores(0.0, 0.98, 0.98, 0.96)
    at = GatesConfig(max_latency_s=0.4, max_size_bytes=150_000_000, max_lost_rows_share=0.02, max_lost_tokens_share=0.1)
    assert all(gate["passed"] for gate in decided(at, measured, evidence).values())
    beyond = GatesConfig(max_latency_s=0.39, max_size_bytes=149_999_999, max_lost_rows_share=0.019, max_lost_tokens_share=0.09)
    refused = {name: gate["detail"] for name, gate in decided(beyond, measured, evidence).items() if not gate["passed"]}
    assert list(refused) == ["seconds of an answer of int8", "bytes of int8", "rows lost of train", "tokens lost of train"]
    assert "0.010 too much" in refused["tokens lost of train"]
    assert refused["seconds of an answer of int8"].startswith(
        "mean [0.300, 0.500] on 32 rows: 0.400, at most 0.390 allowed: 0.010 too much."
    )
    assert "150,000,000, at most 149,999,999 allowed" in refused["bytes of int8"]


def test_task_gate_reads_the_task_that_was_forgotten_most() -> None:
    before = {"lm_eval.a.acc": TaskFigure(value=0.6, stderr=0.03, n=200), "lm_eval.b.acc": TaskFigure(value=0.5, stderr=0.03, n=200)}
    after = {"lm_eval.a.acc": TaskFigure(value=0.62, stderr=0.03, n=200), "lm_eval.b.acc": TaskFigure(value=0.4, stderr=0.03, n=200)}
    evidence = Evidence(comparisons=task_comparisons("merged", after, "base", before, 0.95))
    measured, name = scores(0.0, 0.98, 0.98, 0.96), "loss of merged in its worst task"
    assert decided(GatesConfig(max_task_loss=0.1), measured, evidence)[name]["passed"]
    refused = decided(GatesConfig(max_task_loss=0.09), measured, evidence)[name]
    assert not refused["passed"]
    assert refused["detail"].startswith("lm_eval.b.acc: 0.100, at most 0.090 allowed: 0.010 too much.")
    assert not decided(GatesConfig(max_task_loss=0.09), measured)[name]["passed"]


def test_task_gate_judges_the_served_model_where_it_did_the_tasks() -> None:
    """The merged model has forgotten little, this candidate more and another most."""
    told = []
    for model, value in (("merged", 0.58), ("int8", 0.5), ("int4", 0.2)):
        found = {"lm_eval.a.acc": TaskFigure(value=value, stderr=0.03, n=200)}
        told += task_comparisons(model, found, "base", {"lm_eval.a.acc": TaskFigure(value=0.6, stderr=0.03, n=200)}, 0.95)
    measured, name = scores(0.0, 0.98, 0.98, 0.96), "loss of int8 in its worst task"
    gate = decided(GatesConfig(max_task_loss=0.09), measured, Evidence(comparisons=told))[name]
    assert gate["detail"].startswith("lm_eval.a.acc: 0.100, at most 0.090 allowed: 0.010 too much.")


def test_gates_on_what_nobody_measured_refuse() -> None:
    asked = GatesConfig(max_latency_s=1, max_size_bytes=1, max_lost_rows_share=1, max_lost_tokens_share=1)
    gates = decided(asked, scores(0.0, 0.98, 0.98, 0.96))
    unmeasured = [name for name, gate in gates.items() if gate["detail"].startswith("not measured")]
    assert len(unmeasured) == 6
    assert not any(gates[name]["passed"] for name in unmeasured)


def test_spec_whose_gates_ask_for_a_metric_that_is_not_measured_is_refused() -> None:
    dataset = {"type": "files", "train": "x.jsonl"}
    spec = {"name": "a", "base_model": "file:x", "dataset": dataset, "gates": {"metrics": {"stop_rate": {"min": 1}}}}
    with pytest.raises(ConfigError, match=r"gates\.metrics names \['stop_rate'\]"):
        parse(Spec, spec, "spec")
    metrics = ["exact_match_json", "stop_rate"]
    assert parse(Spec, {**spec, "evaluate": {"metrics": metrics}}, "spec").gates.margin("int8", "exact_match_json", metrics[0]) == 0.02


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["macro_f1", "accuracy"], "first metric is 'macro_f1'"),
        (["accuracy", "accuracy"], "names a metric twice"),
        (["accuray"], "'accuray' is unknown"),
        ([], "at least 1 item"),
    ],
)
def test_spec_with_metrics_that_cannot_decide_is_refused(metrics: list[str], message: str) -> None:
    spec = {"name": "a", "base_model": "file:x", "dataset": {"type": "files", "train": "x.jsonl"}, "evaluate": {"metrics": metrics}}
    with pytest.raises(ConfigError, match=message):
        parse(Spec, spec, "spec")
