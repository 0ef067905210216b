"""evaluate: every model's score on the held-out rows and their slices, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from infra.answers import Answer, Prompt, read_answers, read_prompts
from infra.contracts import write_manifest
from infra.evaluation.scorers import score_rows
from infra.evaluation.statistics import mean_interval
from infra.files import write_json_atomic
from pipelines.spec import EvaluateConfig, Spec
from pipelines.step import Step, StepContext

SCORES_NAME = "scores.json"


def model_names(spec: Spec) -> list[str]:
    """The models that are scored, in the order of the report."""
    return ["base", *(["adapter"] if spec.merged_by == "merge" else []), "merged", *spec.quantize.formats]


def step(spec: Spec) -> Step:
    """The step that needs every model's answers."""
    names = model_names(spec)
    needs = {f"predict-{name}": "answers" for name in names}
    return Step("evaluate", 1, "scores", spec.evaluate, partial(run, names), needs={"render": "tokens", **needs})  # type: ignore[dict-item]


def run(names: Sequence[str], config: EvaluateConfig, context: StepContext) -> None:
    """Writes scores.json: model -> metric (and `metric/slice`) -> value, low, high, n."""
    prompts = read_prompts(context.inputs["render"].path)
    scores = {name: score_model(prompts, read_answers(context.inputs[f"predict-{name}"].path), config) for name in names}
    write_json_atomic(context.output_dir / SCORES_NAME, scores)
    parents = {name: artifact.manifest.digest for name, artifact in context.inputs.items()}
    write_manifest(context.output_dir, "scores", context.provenance, parents=parents)


def score_model(prompts: Sequence[Prompt], answers: Sequence[Answer], config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Each metric over all rows, then over each named slice, with its interval."""
    result = {}
    for metric in config.metrics:
        values = score_rows([answer.text for answer in answers], [prompt.expected for prompt in prompts], metric)
        groups = {metric: values}
        for prompt, value in zip(prompts, values, strict=True):
            if prompt.slice:
                groups.setdefault(f"{metric}/{prompt.slice}", []).append(value)
        for key, group in groups.items():
            interval = mean_interval(group, config.confidence)
            result[key] = {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}
    return result
