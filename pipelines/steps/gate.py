"""gate: the spec's thresholds against what was measured of each candidate; refuses nothing itself, so that a refusal is reported whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from infra.answers import read_answers
from infra.config import Config
from infra.contracts import Kind, write_manifest
from infra.evaluation.resampling import bootstrap_interval, mean
from infra.files import read_json, write_json_atomic
from pipelines.gates import Evidence, Gate, at_least, cost_gates, loss_gate, loss_of, metric_gates, receipt_gates, score_gates, task_gates
from pipelines.measures import GatesConfig
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps import choose
from pipelines.steps.evaluate import COMPARISONS_NAME, NOISE_NAME, SCORES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME, certificate_gates

GATES_NAME = "gates.json"
RECEIPT_NAME = "receipt.json"


class ChoiceConfig(Config):
    """Identity of a choice among candidates."""

    gates: GatesConfig
    choose: str
    """`cheapest`, or the name of a candidate."""


def step(spec: Spec) -> Step:
    """The step that needs the scores, the certificate, the receipt, and every candidate with its answers, for its size and speed."""
    run_named = partial(run, spec.quantize.formats, spec.evaluate.metrics[0])
    needs: dict[str, Kind] = {"evaluate": "scores", "prove": "certificate", "render": "tokens"}
    for name in spec.quantize.formats:
        needs |= {f"quantize-{name}": "quantized", f"predict-{name}": "answers"}
    return Step("gate", 5, "gates", ChoiceConfig(gates=spec.gates, choose=spec.quantize.choose), run_named, needs=needs)


def run(names: Sequence[str], metric: str, config: ChoiceConfig, context: StepContext) -> None:
    """Writes candidates.json, and gates.json of the one that was chosen or refused: `[{"name", "passed", "detail"}]`."""
    scores = read_json(context.inputs["evaluate"].path / SCORES_NAME)
    certificate = read_json(context.inputs["prove"].path / CERTIFICATE_NAME)
    candidates = [
        choose.candidate(
            name,
            context.inputs[f"quantize-{name}"],
            context.inputs[f"predict-{name}"].path,
            scores[name][metric],
            certificate["models"][name]["score_change"],
            [*decide(config.gates, scores, certificate, name, metric, evidence_of(name, context)), *certificate_gates(certificate, name)],
        )
        for name in names
    ]
    choice = choose.choose(candidates, config.choose)
    write_json_atomic(context.output_dir / choose.CANDIDATES_NAME, choice)
    selected = next(each for each in candidates if each["format"] == choice["selected"])
    write_json_atomic(context.output_dir / GATES_NAME, selected["gates"])
    write_manifest(context.output_dir, "gates", context.provenance)


def evidence_of(name: str, context: StepContext) -> Evidence:
    """What the inputs of the step say of one candidate beside scores and certificate."""
    scores_dir, files = context.inputs["evaluate"].path, context.inputs[f"quantize-{name}"].manifest.files
    answers = read_answers(context.inputs[f"predict-{name}"].path)
    latencies_s = [answer.latency_s for answer in answers if answer.latency_s is not None]
    return Evidence(
        comparisons=read_json(scores_dir / COMPARISONS_NAME),
        noise=read_json(scores_dir / NOISE_NAME).get(name),
        receipt=read_json(context.inputs["render"].path / RECEIPT_NAME),
        size_bytes=sum(entry.size_bytes for entry in files.values()),
        latency_s=bootstrap_interval(latencies_s, mean) if latencies_s else None,
    )


def decide(
    config: GatesConfig,
    scores: Mapping[str, Any],
    certificate: Mapping[str, Any],
    served: str,
    metric: str,
    evidence: Evidence | None = None,
) -> list[Gate]:
    """The outcome of every gate for one candidate; a slice, model or figure that was not measured does not pass."""
    evidence, reference = evidence or Evidence(), certificate["reference"]
    margin = config.margin(served, metric, metric)
    assert margin is not None, "the first metric always has one"
    drop = loss_of(scores, served, reference, metric)
    return [
        *score_gates(config, scores, served, metric),
        loss_gate("drop by quantization", config, drop, metric, margin, served, evidence),
        *metric_gates(config, scores, served, reference, evidence),
        *task_gates(config, served, evidence),
        *cost_gates(config, served, evidence),
        *receipt_gates(config, evidence.receipt),
        *agreement_gates(config, certificate),
    ]


def agreement_gates(config: GatesConfig, certificate: Mapping[str, Any]) -> list[Gate]:
    """Adapter and merged model row by row; nothing where full fine-tuning made the merged model itself."""
    if "merged" not in certificate["models"]:
        return []
    agreement = certificate["models"]["merged"]["same_answer"]["value"]
    advice = "Merge again in more precision, or lower gates.min_merge_agreement"
    return [at_least("rows answered alike by adapter and merged", agreement, config.min_merge_agreement, advice)]
