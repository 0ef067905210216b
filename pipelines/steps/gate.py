"""gate: each threshold of the spec against what was measured; refuses nothing itself, so that a refusal is reported whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from infra.contracts import write_manifest
from infra.files import read_json, write_json_atomic
from pipelines.spec import GatesConfig, Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import SCORES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME, certificate_gates

GATES_NAME = "gates.json"
Gate = dict[str, Any]


def step(spec: Spec) -> Step:
    """The step that needs the scores and the certificate."""
    run_named = partial(run, spec.quantize.format, spec.evaluate.metrics[0])
    return Step("gate", 3, "gates", spec.gates, run_named, needs={"evaluate": "scores", "prove": "certificate"})


def run(served: str, metric: str, config: GatesConfig, context: StepContext) -> None:
    """Writes gates.json: `[{"name", "passed", "detail"}]`."""
    scores = read_json(context.inputs["evaluate"].path / SCORES_NAME)
    certificate = read_json(context.inputs["prove"].path / CERTIFICATE_NAME)
    gates = [*decide(config, scores, certificate, served, metric), *certificate_gates(certificate, served)]
    write_json_atomic(context.output_dir / GATES_NAME, gates)
    write_manifest(context.output_dir, "gates", context.provenance)


def decide(config: GatesConfig, scores: Mapping[str, Any], certificate: Mapping[str, Any], served: str, metric: str) -> list[Gate]:
    """The outcome of every gate; a slice or model that was not measured does not pass."""
    value = {name: by_metric[metric]["value"] for name, by_metric in scores.items()}
    drop = value[certificate["reference"]] - value[served]
    gates = [_at_least(f"{metric} of {served}", value[served], config.min_score)]
    for name, threshold in config.min_slice_scores.items():
        measured = scores[served].get(f"{metric}/{name}", {}).get("value")
        gates.append(_at_least(f"{metric} of {served} on slice {name}", measured, threshold))
    gates.append(_at_least(f"gain of {served} over base", value[served] - value["base"], config.min_gain))
    gates.append(_at_most("drop by quantization", drop, config.max_quantization_drop))
    if "merged" in certificate["models"]:  # full fine-tuning makes the merged model itself
        agreement = certificate["models"]["merged"]["same_answer"]["value"]
        gates.append(_at_least("rows answered alike by adapter and merged", agreement, config.min_merge_agreement))
    return gates


def _at_least(name: str, measured: float | None, threshold: float) -> Gate:
    if measured is None:
        return {"name": name, "passed": False, "detail": f"not measured, at least {threshold:.3f} needed"}
    return {"name": name, "passed": measured >= threshold - 1e-9, "detail": f"{measured:.3f}, at least {threshold:.3f} needed"}


def _at_most(name: str, measured: float, threshold: float) -> Gate:
    return {"name": name, "passed": measured <= threshold + 1e-9, "detail": f"{measured:.3f}, at most {threshold:.3f} allowed"}
