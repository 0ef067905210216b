"""What a person sees of scores: the page, the pictures, the screen and MLflow's names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from mlflow.utils.validation import _validate_metric_name
from rich.console import Console

from infra.answers import Answer, Prompt
from infra.evaluation.metrics import find_metric
from infra.evaluation.noise import noise_floor, told
from pipelines import plots, report
from pipelines.display import score_table
from pipelines.measures import EvaluateConfig
from pipelines.steps.evaluate import as_rows, compare_models, details, score_model

PROMPTS = [Prompt(row=row, ids=(1,), expected=label, slice=f"{label} rows") for row, label in enumerate(("on", "off") * 10)]
CANDIDATES = [
    {"format": "int8", "chosen": True, "passed": True, "bytes": 1e6, "tokens_per_s": 9.0, "ms_per_token": 1.0, "why": "",
     "score": {"value": 0.9, "low": 0.7, "high": 1.0}, "change": {"value": 0.0, "low": -0.1, "high": 0.1}}
]  # fmt: skip
METRICS = ("accuracy", "macro_f1", "latency_s", "tool_call")


def answered(num_right: int) -> list[Any]:
    answers = [
        Answer(row=prompt.row, ids=(1,), text=prompt.expected if prompt.row < num_right else "?", finish_reason="stop", latency_s=2.5)
        for prompt in PROMPTS
    ]
    return as_rows(PROMPTS, answers)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    rows = {"base": answered(0), "adapter": answered(20), "int8": answered(18)}
    config = EvaluateConfig(metrics=METRICS)
    metrics = [find_metric(name) for name in METRICS]
    noise = noise_floor(metrics, rows["int8"], rows["int8"], 20, 0.95)
    return {
        "run_id": "r",
        "model": {"name": "toy", "version": "1", "aliases": [], "digest": "d" * 64},
        "scores": {name: score_model(PROMPTS, found, metrics, config) for name, found in rows.items()},
        "comparisons": compare_models(metrics, rows, "adapter", {"int8": {"accuracy": 0.02}}, 0.95),
        "details": {name: details(found, METRICS) for name, found in rows.items()},
        "noise": {"int8": {**noise, "said": told(noise)}},
        "gates": [],
        "candidates": {"candidates": CANDIDATES, "comparison": ""},
        "parity": {"models": {}},
        "receipt": {},
        "timings_s": {"train": 1.0},
        "skipped": [],
        "serving": None,
        "training": {"loss": [[1, 2.0], [2, 1.0]], "heldout_loss": [[2, 1.5]], "learning_rate": [[1, 0.1], [2, 0.1]]},
    }


def test_compare_models_pairs_each_with_what_was_trained_and_with_the_base(made: dict[str, Any]) -> None:
    pairs = [(each["model"], each["reference"]) for each in made["comparisons"] if each["metric"] == "accuracy"]
    assert pairs == [("int8", "adapter"), ("adapter", "base"), ("int8", "base")]
    first = made["comparisons"][0]
    assert (first["loss"]["value"], first["test"], first["verdict"]) == (pytest.approx(0.1), "mcnemar", "undecided")
    assert [each["metric"] for each in made["comparisons"] if "margin" in each] == ["accuracy"]


def test_page_shows_comparisons_fields_noise_and_bars_of_any_length(made: dict[str, Any], tmp_path: Path) -> None:
    _, page = report.write(made, tmp_path)
    text = page.read_text()
    assert "+0.100 [" in text
    assert "0.020: undecided" in text
    assert "deterministic: 20 rows answered twice, all alike" in text
    assert "(no call)" in text
    assert "2.500 [2.500, 2.500] of 20" in text
    assert 'width="340.0"' in text  # seconds beyond 1 end at the chart's end
    assert max(float(part.split('"')[0]) for part in text.split('class="bar" x="150" y="6" width="')[1:]) <= 340


def test_pictures_hold_one_panel_a_metric_and_a_confusion_a_model(made: dict[str, Any]) -> None:
    figures = plots.draw(made)
    assert list(figures) == ["plots/loss.png", "plots/scores.png", "plots/candidates.png", "plots/confusion.png"]
    assert {axes.get_ylabel() for axes in figures["plots/scores.png"].axes} == set(METRICS)
    assert [axes.get_title() for axes in figures["plots/confusion.png"].axes] == ["base", "adapter", "int8"]
    assert {text.get_text() for text in figures["plots/confusion.png"].axes[1].texts} == {"10"}


def test_pictures_without_labels_hold_no_confusion(made: dict[str, Any]) -> None:
    assert "plots/confusion.png" not in plots.draw({**made, "details": {"base": {}}})


def test_logged_metrics_have_names_that_mlflow_takes() -> None:
    found = report.logged_metrics({"int8": {"em/tool=Hass(On)": {"value": 0.5}, "m:f/language=de": {"value": 1.0}}}, {"train": 2.0})
    assert found == {"int8/em/tool:Hass_On_": 0.5, "int8/m:f/language:de": 1.0, "seconds/train": 2.0}
    for name in found:
        _validate_metric_name(name)


def test_score_table_leaves_found_slices_to_the_report(made: dict[str, Any]) -> None:
    scores = {model: {**found, "accuracy/tool=on": found["accuracy"]} for model, found in made["scores"].items()}
    console = Console(width=200, file=io.StringIO())
    console.print(score_table(scores))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "accuracy/on rows" in text
    assert "tool=on" not in text
