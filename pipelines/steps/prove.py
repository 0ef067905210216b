"""prove: the certificate that what will be served answers as what was trained, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from infra.answers import Answer, Prompt, read_answers, read_prompts
from infra.config import Config
from infra.contracts import write_manifest
from infra.evaluation.scorers import score_rows
from infra.evaluation.statistics import agreement, paired_difference
from infra.files import write_json_atomic
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import model_names

CERTIFICATE_NAME = "certificate.json"
MAX_DIFFERENCES_SHOWN = 20


class ProveConfig(Config):
    """Identity of a certificate."""

    metric: str
    confidence: float


def step(spec: Spec) -> Step:
    """The step that needs the answers of what was trained, the adapter or else the merged model, and of all that comes after it."""
    config = ProveConfig(metric=spec.evaluate.metrics[0], confidence=spec.evaluate.confidence)
    reference, *names = model_names(spec)[1:]
    needs = {f"predict-{name}": "answers" for name in (reference, *names)}
    return Step("prove", 2, "certificate", config, partial(run, reference, names), needs={"render": "tokens", **needs})  # type: ignore[dict-item]


def run(reference: str, names: Sequence[str], config: ProveConfig, context: StepContext) -> None:
    """Writes certificate.json: `reference` compared with each of `names`."""
    prompts = read_prompts(context.inputs["render"].path)
    trained = read_answers(context.inputs[f"predict-{reference}"].path)
    certificate = {name: compare(prompts, trained, read_answers(context.inputs[f"predict-{name}"].path), config) for name in names}
    write_json_atomic(context.output_dir / CERTIFICATE_NAME, {"reference": reference, "models": certificate})
    parents = {name: artifact.manifest.digest for name, artifact in context.inputs.items()}
    write_manifest(context.output_dir, "certificate", context.provenance, parents=parents)


def compare(prompts: Sequence[Prompt], reference: Sequence[Answer], other: Sequence[Answer], config: ProveConfig) -> dict[str, Any]:
    """Agreement of two models' answers and the paired difference of their scores (other minus reference)."""
    expected = [prompt.expected for prompt in prompts]
    reference_text = [answer.text for answer in reference]
    other_text = [answer.text for answer in other]
    same = agreement(reference_text, other_text, config.confidence)
    change = paired_difference(
        score_rows(other_text, expected, config.metric), score_rows(reference_text, expected, config.metric), config.confidence
    )
    differing = [
        {"row": answer.row, "reference": answer.text, "other": text, "expected": wanted}
        for answer, text, wanted in zip(reference, other_text, expected, strict=True)
        if answer.text != text
    ]
    return {
        "same_answer": {"value": same.value, "low": same.low, "high": same.high, "n": same.n},
        "score_change": {"value": change.value, "low": change.low, "high": change.high, "n": change.n},
        "num_differing": len(differing),
        "differing": differing[:MAX_DIFFERENCES_SHOWN],
    }
