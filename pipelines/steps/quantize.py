"""quantize: the merged model in the weight format of the engine that will serve it."""

from __future__ import annotations

from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from serving.config import QuantizeConfig, QuantizeJob


def step(spec: Spec) -> Step:
    """The step that needs the merged model."""
    return Step("quantize", 2, "quantized", spec.quantize, run, needs={spec.merged_by: "merged"})


def run(config: QuantizeConfig, context: StepContext) -> None:
    """Quantizes with the engine's own tools."""
    context.run_program(
        "serving.quantize.openvino", context.job(QuantizeJob, merged_dir=context.input_of_kind("merged").path, quantize=config)
    )
