"""quantize-*: the merged model in each candidate's weight format, by the tools of the engine that would serve it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from infra.contracts import Kind
from infra.errors import ArtifactError
from pipelines.spec import Spec
from pipelines.step import Artifact, Step, StepContext
from serving.formats import FormatConfig, QuantizeJob, weight_problems
from serving.limits import ENGINE_OF_FORMAT

PROGRAM_OF_ENGINE = {"openvino": "serving.quantize.openvino", "torch": "serving.quantize.bnb", "vllm": "serving.quantize.vllm"}


def steps(spec: Spec) -> list[Step]:
    """One step a candidate; it needs the merged model, for OpenVINO its export, and the training rows where it looks at them."""
    made = []
    for weight_format in spec.quantize.formats:
        config = spec.quantize.of(weight_format)
        needs: dict[str, Kind] = {spec.merged_by: "merged"}
        if ENGINE_OF_FORMAT[weight_format] == "openvino":
            needs["export"] = "exported"
        if config.calibration_rows is not None:
            needs["render"] = "tokens"
        made.append(Step(f"quantize-{weight_format}", 2, "quantized", config, run, needs=needs, check=partial(check, config)))
    return made


def run(config: FormatConfig, context: StepContext) -> None:
    """Quantizes with the engine's own tools."""
    exported, tokens = context.inputs.get("export"), context.inputs.get("render")
    job = context.job(
        QuantizeJob,
        merged_dir=context.input_of_kind("merged").path,
        quantize=config,
        exported_dir=exported.path if exported else None,
        tokens_dir=tokens.path if tokens else None,
    )
    context.run_program(PROGRAM_OF_ENGINE[ENGINE_OF_FORMAT[config.format]], job)


def check(config: FormatConfig, made: Artifact, inputs: Mapping[str, Artifact]) -> None:
    """Raises ArtifactError where what lies there was made of another model, or with other weights than were asked for."""
    merged = next(artifact for artifact in inputs.values() if artifact.manifest.kind == "merged")
    problems = []
    if (parent := made.manifest.parents.get("merged")) != merged.manifest.digest:
        problems.append(f"made from a model with digest {parent}, this run's has {merged.manifest.digest}")
    facts = made.manifest.model
    if facts is None or facts.quantization != config.format or facts.weights is None:
        problems.append(f"its manifest tells of {facts.quantization if facts else None!r} weights, {config.format!r} is needed")
    else:
        problems += weight_problems(facts.weights, config)
    if problems:
        raise ArtifactError(f"{made.path}: {'; '.join(problems)}. Remove this folder and run again.")
