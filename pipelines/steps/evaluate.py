"""evaluate: every model's figures on the held-out rows and their slices, and each model compared with what it was made from.

- `scores.json`: model -> metric, and `metric/slice` -> value, low, high, n.
- `comparisons.json`: a list of differences, with intervals, p-values adjusted for the number of metrics, verdicts and advice on rows.
- `details.json`: model -> what lies behind a metric: outcomes by field of a call, the confusion of labels.
- `noise.json`: candidate -> what asking twice changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infra.answers import EXPECTED_NAME, Answer, ExpectedLogprob, Prompt, read_answers, read_expected, read_prompts
from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.evaluation.comparison import compare, told_together
from infra.evaluation.labels import confusion, label_pair
from infra.evaluation.metrics import Metric, Row, find_metric, measure
from infra.evaluation.noise import noise_floor
from infra.evaluation.own_scorer import is_own, source_digest
from infra.evaluation.slices import slice_rows
from infra.evaluation.tasks import read_figures, task_comparisons, task_scores
from infra.evaluation.tool_calls import field_table
from infra.files import write_json_atomic
from pipelines.measures import EvaluateConfig
from pipelines.spec import Spec
from pipelines.step import Step, StepContext

SCORES_NAME = "scores.json"
COMPARISONS_NAME = "comparisons.json"
DETAILS_NAME = "details.json"
NOISE_NAME = "noise.json"
BASE = "base"
TRAINING_TASK_MODELS = (BASE, "merged")
LABEL_METRICS = ("accuracy", "macro_f1")
CALL_METRICS = ("tool_call", "tool_fields", "tool_name")

Margins = Mapping[str, Mapping[str, float]]


class ScoreConfig(Config):
    """Identity of the figures."""

    evaluate: EvaluateConfig
    margins: dict[str, dict[str, float]]
    """Most that a model may lose against its reference, by model and metric."""


def model_names(spec: Spec) -> list[str]:
    """The models that are scored, in the order of the report."""
    return [BASE, *(["adapter"] if spec.merged_by == "merge" else []), "merged", *candidate_names(spec)]


def candidate_names(spec: Spec) -> list[str]:
    """The models of which one will be served."""
    return list(spec.quantize.formats)


def task_models(spec: Spec) -> list[str]:
    """The models that do the tasks of lm-evaluation-harness."""
    tasks = spec.evaluate.lm_eval
    if tasks is None:
        return []
    return [*TRAINING_TASK_MODELS, *(candidate_names(spec) if tasks.on_served else [])]


def step(spec: Spec) -> Step:
    """The step that needs every model's answers."""
    names = model_names(spec)
    repeated = [f"repeat-{name}" for name in candidate_names(spec) if spec.evaluate.repeated_rows]
    needs = {"render": "tokens", **dict.fromkeys((*(f"predict-{name}" for name in names), *repeated), "answers")}
    needs |= {f"tasks-{name}": "scores" for name in task_models(spec)}
    config = ScoreConfig(evaluate=spec.evaluate, margins=margins(spec))
    return Step("evaluate", 2, "scores", config, partial(run, names), needs=needs, source_digests=scorer_digests(spec))  # type: ignore[arg-type]


def scorer_digests(spec: Spec) -> dict[str, str]:
    """Source digests of the scorers of one's own: part of the identity of whatever they score."""
    return {name: source_digest(name) for name in spec.evaluate.metrics if is_own(name)}


def margins(spec: Spec) -> dict[str, dict[str, float]]:
    """The margins of the spec's gates, by candidate and metric."""
    first = spec.evaluate.metrics[0]
    asked = {name: {metric: spec.gates.margin(name, metric, first) for metric in spec.evaluate.metrics} for name in candidate_names(spec)}
    return {name: {metric: margin for metric, margin in found.items() if margin is not None} for name, found in asked.items()}


def run(names: Sequence[str], config: ScoreConfig, context: StepContext) -> None:
    """Writes the four files."""
    prompts = read_prompts(context.inputs["render"].path)
    paths = {name: artifact.path for name, artifact in context.inputs.items()}
    rows = {name: read_rows(prompts, paths[f"predict-{name}"]) for name in names}
    evaluate = config.evaluate
    metrics = [find_metric(name) for name in evaluate.metrics]
    again = {name: paths[f"repeat-{name}"] for name in names if f"repeat-{name}" in paths}
    noise = {
        name: noise_floor(metrics, rows[name][: evaluate.repeated_rows], read_rows(prompts, path), len(prompts), evaluate.confidence)
        for name, path in again.items()
    }
    tasks = {name: read_figures(paths[f"tasks-{name}"]) for name in names if f"tasks-{name}" in paths}
    forgotten = [
        told
        for name, figures in tasks.items()
        if name != BASE
        for told in task_comparisons(name, figures, BASE, tasks[BASE], evaluate.confidence)
    ]
    found = {
        SCORES_NAME: {
            name: score_model(prompts, rows[name], metrics, evaluate) | task_scores(tasks.get(name, {}), evaluate.confidence)
            for name in names
        },
        COMPARISONS_NAME: [*compare_models(metrics, rows, names[1], config.margins, evaluate.confidence), *forgotten],
        DETAILS_NAME: {name: details(rows[name], evaluate.metrics) for name in names},
        NOISE_NAME: noise,
    }
    for file_name, value in found.items():
        write_json_atomic(context.output_dir / file_name, value)
    parents = {name: artifact.manifest.digest for name, artifact in context.inputs.items()}
    write_manifest(context.output_dir, "scores", context.provenance, parents=parents)


def read_rows(prompts: Sequence[Prompt], folder: Path) -> list[Row]:
    """What one model answered to the prompts, or to the first of them, with the likelihoods of the expected answers if they lie there."""
    expected = read_expected(folder) if (folder / EXPECTED_NAME).is_file() else ()
    answers = read_answers(folder)
    return as_rows(prompts[: len(answers)], answers, expected)


def as_rows(prompts: Sequence[Prompt], answers: Sequence[Answer], expected: Sequence[ExpectedLogprob] = ()) -> list[Row]:
    """Each prompt with its answer. Raises ConfigError where they do not belong together."""
    logprobs = {each.row: each for each in expected}
    if [prompt.row for prompt in prompts] != [answer.row for answer in answers]:
        raise ConfigError(f"Found {len(answers)} answers for {len(prompts)} prompts, or for other rows. Answer the same rows again.")
    return [Row(prompt.expected, answer, logprobs.get(prompt.row)) for prompt, answer in zip(prompts, answers, strict=True)]


def score_model(
    prompts: Sequence[Prompt], rows: Sequence[Row], metrics: Sequence[Metric], config: EvaluateConfig
) -> dict[str, dict[str, float]]:
    """Each metric over all rows, then over each slice, with its interval; a metric that no row carries is left out."""
    if len(rows) < len(prompts):
        raise ConfigError(f"Found {len(rows)} answers for {len(prompts)} prompts. Answer all rows again.")
    result = {}
    slices = slice_rows(prompts, config.slices)
    for metric in metrics:
        observed = [metric.observe(row) for row in rows]
        groups = {metric.name: observed, **{f"{metric.name}/{name}": [observed[at] for at in places] for name, places in slices.items()}}
        for key, group in groups.items():
            if present := [value for value in group if value is not None]:
                interval = measure(metric, present, config.confidence)
                result[key] = {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}
    return result


def compare_models(
    metrics: Sequence[Metric], rows: Mapping[str, Sequence[Row]], reference: str, margins: Margins, confidence: float
) -> list[dict[str, Any]]:
    """Each model with what was trained, and all but the base with the base, by every metric that both carry."""
    others = [name for name in rows if name not in (BASE, reference)]
    pairs = [*((name, reference) for name in others), *((name, BASE) for name in (reference, *others))]
    told: list[dict[str, Any]] = []
    for model, other in pairs:
        found = []
        for metric in metrics:
            observed = [(metric.observe(one), metric.observe(two)) for one, two in zip(rows[model], rows[other], strict=True)]
            present = [pair for pair in observed if None not in pair]
            if present:
                mine, theirs = zip(*present, strict=True)
                found.append(compare(metric, model, other, mine, theirs, confidence))
        told += told_together(found, margins.get(model, {}) if other == reference else {}, confidence)
    return told


def details(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """What lies behind the figures of one model, for the metrics that are asked for."""
    answers, expected = [row.answer.text for row in rows], [row.expected for row in rows]
    found: dict[str, Any] = {}
    if any(name in CALL_METRICS for name in metrics):
        found["fields"] = field_table(answers, expected)
    if any(name in LABEL_METRICS for name in metrics):
        found["confusion"] = confusion([label_pair(answer, text) for answer, text in zip(answers, expected, strict=True)])
    return found
