"""The choice among candidates for serving, and what decides each one's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.contracts import Manifest, ModelFacts, WeightFacts, write_manifest
from infra.errors import ArtifactError
from infra.files import sha256_json
from infra.provenance import Provenance
from pipelines.spec import Spec
from pipelines.step import Artifact, Step
from pipelines.steps import choose, export, predict, quantize, repeat
from serving.formats import CHEAPEST, FormatConfig, QuantizeConfig, WeightFormat, weight_problems


def candidate(name: str, score: float = 0.9, megabytes: float = 100, tokens_per_s: float = 1000, refused: tuple[str, ...] = ()) -> Any:
    return {
        "format": name,
        "score": {"value": score},
        "change": {"value": score - 0.98, "low": score - 1, "high": score - 0.96},
        "bytes": megabytes * 1e6,
        "tokens_per_s": tokens_per_s,
        "gates": [{"name": gate, "passed": False} for gate in refused] or [{"name": "score", "passed": True}],
        "passed": not refused,
    }


def chosen(*candidates: Any, wanted: str = "cheapest") -> str | None:
    made = choose.choose(candidates, wanted)
    names = [each["format"] for each in made["candidates"] if each["chosen"]]
    assert len(names) == made["passed"]
    assert not names or names == [made["selected"]]
    return names[0] if names else None


def test_cheapest_is_the_smallest_that_passes() -> None:
    small, large = candidate("small", 0.80, 60, refused=("score",)), candidate("large", 0.99, 200, 9000)
    assert chosen(large, small, candidate("middle", 0.9, 100, 10)) == "middle"
    assert chosen(large, {**small, "passed": True, "gates": []}) == "small"


def test_cheapest_among_those_of_nearly_the_same_size_is_the_fastest_and_then_the_best() -> None:
    first = candidate("first", 0.97, 100, 1000)
    assert chosen(first, candidate("faster", 0.90, 104, 1200)) == "faster"
    assert chosen(first, candidate("too large", 0.90, 106, 1200)) == "first"
    assert chosen(first, candidate("hardly faster", 0.96, 100, 1050)) == "first"
    assert chosen(first, candidate("better", 0.98, 104, 950)) == "better"
    assert chosen(first, candidate("its equal", 0.97, 100, 1000)) == "first"


def test_candidate_asked_for_by_name_is_taken_or_nothing_is() -> None:
    cheap, wanted = candidate("cheap", 0.99, 50), candidate("wanted", 0.95, 100)
    assert chosen(cheap, wanted, wanted="wanted") == "wanted"
    refused = choose.choose([cheap, candidate("wanted", 0.7, refused=("score",))], "wanted")
    assert (refused["passed"], refused["selected"]) == (False, "wanted")
    assert "quantize.choose asks for wanted" in refused["candidates"][0]["why"]


def test_where_all_are_refused_the_best_of_them_stands_for_the_run() -> None:
    made = choose.choose([candidate("bad", 0.5, refused=("score",)), candidate("less bad", 0.8, refused=("score", "drop"))], "cheapest")
    assert (made["passed"], made["selected"]) == (False, "less bad")
    assert [each["why"] for each in made["candidates"]] == ["refused: score", "refused: score, drop (the best of those refused)"]


def test_every_candidate_that_passed_says_why_it_was_not_taken() -> None:
    made = choose.choose(
        [candidate("taken", 0.9, 100), candidate("large", 0.9, 150), candidate("slow", 0.9, 102, 700), candidate("worse", 0.8, 102, 990)],
        "cheapest",
    )
    assert [each["why"] for each in made["candidates"]] == [
        "the cheapest that passes",
        "passes; 50% larger than taken",
        "passes; as small as taken, 30% slower",
        "passes; as small and fast as taken, whose score is as good or better",
    ]


@pytest.mark.parametrize(
    ("free", "aware", "said"),
    [(0.83, 0.93, "at most half of it remains"), (0.83, 0.88, "more than half of it remains"), (0.98, 0.97, "there is no loss to halve")],
)
def test_comparison_says_whether_data_halves_the_loss(free: float, aware: float, said: str) -> None:
    text = choose.comparison([candidate("openvino-int4", free), candidate("openvino-int4-awq", aware)])
    assert text is not None
    assert text.endswith(said)
    assert f"data-aware INT4 loses {0.98 - aware:.3f} (" in text
    assert f"data-free INT4 {0.98 - free:.3f} (" in text
    assert choose.comparison([candidate("openvino-int4", free), candidate("openvino-int8")]) is None


def spec(**settings: Any) -> Spec:
    return Spec.model_validate({"name": "toy", "base_model": "hf:a/b", "dataset": {"type": "files", "train": "rows.jsonl"}, **settings})


def by_name(steps: list[Step]) -> dict[str, Step]:
    return {step.name: step for step in steps}


def test_spec_that_says_nothing_has_int8_as_its_only_candidate() -> None:
    made = by_name([*export.steps(spec()), *quantize.steps(spec())])
    assert list(made) == ["export", "quantize-openvino-int8"]
    assert made["quantize-openvino-int8"].needs == {"merge": "merged", "export": "exported"}


def test_candidates_share_one_export_and_only_those_that_look_at_data_need_it() -> None:
    several = spec(quantize={"formats": ["openvino-int4", "openvino-int4-awq", "bnb-nf4"]}, train={"method": "full"})
    assert len(export.steps(several)) == 1
    assert {name: set(step.needs) for name, step in by_name(quantize.steps(several)).items()} == {
        "quantize-openvino-int4": {"train", "export"},
        "quantize-openvino-int4-awq": {"train", "export", "render"},
        "quantize-bnb-nf4": {"train"},
    }
    assert export.steps(spec(quantize={"formats": ["bnb-nf4"]})) == []


def test_option_changes_only_the_candidates_that_it_concerns() -> None:
    formats: list[WeightFormat] = ["openvino-int8", "openvino-int4", "openvino-int4-awq", "bf16", "bnb-int8", "bnb-nf4", "vllm-bf16"]
    first = QuantizeConfig.model_validate({"formats": formats})

    def changed(**options: Any) -> list[str]:
        second = first.model_copy(update=options)
        return [name for name in formats if first.of(name) != second.of(name)]

    assert changed(group_size=32) == changed(int4_share=0.5) == ["openvino-int4", "openvino-int4-awq"]
    assert changed(calibration_rows=16) == ["openvino-int4-awq"]


def test_each_candidate_is_answered_and_timed_by_the_engine_that_would_serve_it() -> None:
    formats = ("openvino-int8", "bnb-nf4", "vllm-bf16")
    made = by_name(predict.steps(spec(quantize={"formats": formats}, serve={"precision": "bf16"})))
    configs = {name: made[f"predict-{name}"].config.model_dump() for name in formats}
    assert {name: (config["engine"], config["precision"]) for name, config in configs.items()} == {
        "openvino-int8": ("openvino", "bf16"),
        "bnb-nf4": ("torch", "bf16"),
        "vllm-bf16": ("vllm", "bf16"),
    }


@pytest.mark.parametrize(
    ("asked", "num_rows"),
    [
        ({}, 0),
        ({"gates": {"max_latency_s": 1}}, 32),
        ({"evaluate": {"metrics": ["valid_json", "latency_s"], "latency_rows": 5}}, 5),
    ],
)
def test_answers_are_timed_alone_where_somebody_reads_it(asked: dict[str, Any], num_rows: int) -> None:
    made = by_name([*predict.steps(spec(**asked)), *repeat.steps(spec(**asked))])
    configs = {name: made[f"{name}-openvino-int8"].config.model_dump() for name in ("predict", "repeat")}
    assert {name: config["latency_rows"] for name, config in configs.items()} == {"predict": num_rows, "repeat": 0}


@pytest.mark.parametrize(
    ("quantize_config", "message"),
    [
        ({"formats": []}, "at least 1"),
        ({"formats": ["openvino-int8", "openvino-int8"]}, "names one twice"),
        ({"formats": ["openvino-int8"], "choose": "bf16"}, "choose is 'bf16', formats are"),
        ({"format": "openvino-int8"}, "Extra inputs"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(quantize_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeConfig.model_validate(quantize_config)


INT4 = FormatConfig(format="openvino-int4", group_size=64, int4_share=1.0)


def quantized(folder: Path, **weights: Any) -> Manifest:
    """The manifest of a model of which only the facts matter."""
    facts = ModelFacts(
        base_model="hf:a/b", base_digest="b", tokenizer_digest="t", chat_template_digest="c", special_tokens={}, context_tokens=1,
        stop_ids=(), quantization="openvino-int4", weights=WeightFacts(**weights) if weights else None,
    )  # fmt: skip
    folder.mkdir(parents=True)
    return write_manifest(folder, "quantized", Provenance(), facts, {"merged": merged(folder).digest})


def merged(folder: Path) -> Manifest:
    return Manifest(kind="merged", files={}, provenance=Provenance())


def test_quantized_artifact_as_asked_for_passes_and_any_other_is_refused(tmp_path: Path) -> None:
    good = {"mode": "int4_asym", "group_size": 64}
    inputs = {"merge": Artifact(tmp_path, merged(tmp_path))}
    quantize.check(INT4, Artifact(tmp_path, quantized(tmp_path / "good", **good)), inputs)
    for name, weights, problem in (
        ("group", {**good, "group_size": 128}, "in groups of 128, 64 is needed"),
        ("bits", {"mode": "int8_asym"}, "weights are int8_asym, int4_asym is needed"),
        ("none", {}, "manifest tells of 'openvino-int4' weights"),
    ):
        with pytest.raises(ArtifactError, match=problem):
            quantize.check(INT4, Artifact(tmp_path, quantized(tmp_path / name, **weights)), inputs)


def test_quantized_artifact_of_another_run_is_refused(tmp_path: Path) -> None:
    made = quantized(tmp_path / "stale", mode="int4_asym", group_size=64)
    other = Manifest(kind="merged", files={}, provenance=Provenance(), model=made.model)
    with pytest.raises(ArtifactError, match=r"made from a model with digest .* this run's has"):
        quantize.check(INT4, Artifact(tmp_path, made), {"merge": Artifact(tmp_path, other)})


def test_data_aware_weights_without_data_are_a_problem() -> None:
    asked = QuantizeConfig(formats=("openvino-int4-awq",)).of("openvino-int4-awq")
    found = WeightFacts(mode="int4_asym", group_size=64)
    assert weight_problems(found, asked) == ["no training rows were looked at"]
    assert weight_problems(found.model_copy(update={"calibration_rows": 128}), asked) == []


def test_manifest_without_weight_facts_keeps_the_digest_it_had_before_there_were_any(tmp_path: Path) -> None:
    manifest = quantized(tmp_path / "old")
    stored = json.loads((tmp_path / "old/manifest.json").read_text())
    del stored["model"]["weights"]
    assert manifest.digest == sha256_json({"kind": "quantized", "model": stored["model"], "files": {}})
    assert quantized(tmp_path / "new", mode="nf4").digest != manifest.digest


def test_plot_shows_every_candidate_at_its_size_speed_and_score() -> None:
    from pipelines import plots

    score = {"value": 0.9, "low": 0.8, "high": 0.95}
    made = choose.choose(
        [{**candidate(name, 0.9, size, speed), "score": score} for name, size, speed in (("a", 50, 700), ("b", 90, 400))], CHEAPEST
    )
    figure = plots.tradeoff(made["candidates"])
    by_size, by_speed = figure.axes
    for axes, places in ((by_size, [50, 90]), (by_speed, [700, 400])):
        points = [line for line in axes.lines if line.get_marker() == "o"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(place, 0.9) for place in places]
        assert [line.get_color() for line in points] == ["tab:green", "tab:blue"]
        assert [text.get_text() for text in axes.texts] == ["a", "b"]
        assert axes.get_xlim()[0] == 0
