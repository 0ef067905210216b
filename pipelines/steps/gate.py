"""gate: the spec's thresholds against what was measured of each candidate; refuses nothing itself, so that a refusal is reported whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from infra.config import Config
from infra.contracts import Kind, write_manifest
from infra.files import read_json, write_json_atomic
from pipelines.spec import GatesConfig, Spec
from pipelines.step import Step, StepContext
from pipelines.steps import choose
from pipelines.steps.evaluate import SCORES_NAME
from pipelines.steps.prove import CERTIFICATE_NAME

GATES_NAME = "gates.json"
Gate = dict[str, Any]


class ChoiceConfig(Config):
    """Identity of a choice among candidates."""

    gates: GatesConfig
    choose: str
    """`cheapest`, or the name of a candidate."""


def step(spec: Spec) -> Step:
    """The step that needs the scores, the certificate, and every candidate with its answers, for its size and speed."""
    run_named = partial(run, spec.quantize.formats, spec.evaluate.metrics[0])
    needs: dict[str, Kind] = {"evaluate": "scores", "prove": "certificate"}
    for name in spec.quantize.formats:
        needs |= {f"quantize-{name}": "quantized", f"predict-{name}": "answers"}
    return Step("gate", 3, "gates", ChoiceConfig(gates=spec.gates, choose=spec.quantize.choose), run_named, needs=needs)


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
            decide(config.gates, scores, certificate, name, metric),
        )
        for name in names
    ]
    choice = choose.choose(candidates, config.choose)
    write_json_atomic(context.output_dir / choose.CANDIDATES_NAME, choice)
    selected = next(each for each in candidates if each["format"] == choice["selected"])
    write_json_atomic(context.output_dir / GATES_NAME, selected["gates"])
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
