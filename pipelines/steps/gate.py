"""gate: each threshold of the spec against what was measured; refuses nothing itself, so that a refusal is reported whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from infra.contracts import write_manifest
from infra.files import read_json, write_json_atomic
from pipelines.gates import Evidence, Gate, at_least, cost_gates, loss_gate, loss_of, metric_gates, receipt_gates, score_gates
from pipelines.measures import GatesConfig
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import COMPARISONS_NAME, NOISE_NAME, SCORES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME

GATES_NAME = "gates.json"
RECEIPT_NAME = "receipt.json"


def step(spec: Spec) -> Step:
    """The step that needs the scores, the certificate, the receipt and the model that they are about."""
    run_named = partial(run, spec.quantize.format, spec.evaluate.metrics[0])
    needs = {"evaluate": "scores", "prove": "certificate", "render": "tokens", "quantize": "quantized"}
    return Step("gate", 3, "gates", spec.gates, run_named, needs=needs)  # type: ignore[arg-type]


def run(served: str, metric: str, config: GatesConfig, context: StepContext) -> None:
    """Writes gates.json: `[{"name", "passed", "detail"}]`."""
    scores_dir = context.inputs["evaluate"].path
    certificate = read_json(context.inputs["prove"].path / CERTIFICATE_NAME)
    files = context.inputs["quantize"].manifest.files
    evidence = Evidence(
        comparisons=read_json(scores_dir / COMPARISONS_NAME),
        noise=read_json(scores_dir / NOISE_NAME).get(served),
        receipt=read_json(context.inputs["render"].path / RECEIPT_NAME),
        size_bytes=sum(entry.size_bytes for entry in files.values()),
    )
    gates = decide(config, read_json(scores_dir / SCORES_NAME), certificate, served, metric, evidence)
    write_json_atomic(context.output_dir / GATES_NAME, gates)
    write_manifest(context.output_dir, "gates", context.provenance)


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
    margin = config.max_quantization_drops.get(served, config.max_quantization_drop)
    drop = loss_of(scores, served, reference, metric)
    return [
        *score_gates(config, scores, served, metric),
        loss_gate("drop by quantization", config, drop, metric, margin, served, evidence),
        *metric_gates(config, scores, served, reference, evidence),
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
