"""export: the merged model as OpenVINO reads it, made once for all formats of that engine."""

from __future__ import annotations

from infra.config import Config
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from serving.formats import ExportJob
from serving.limits import ENGINE_OF_FORMAT


class ExportConfig(Config):
    """Nothing to choose: the weights stay whole."""


def steps(spec: Spec) -> list[Step]:
    """The step that needs the merged model; none where no candidate is OpenVINO's."""
    if not any(ENGINE_OF_FORMAT[each] == "openvino" for each in spec.quantize.formats):
        return []
    return [Step("export", 1, "exported", ExportConfig(), run, needs={spec.merged_by: "merged"})]


def run(config: ExportConfig, context: StepContext) -> None:
    """Exports with optimum-intel."""
    context.run_program("serving.quantize.export", context.job(ExportJob, merged_dir=context.input_of_kind("merged").path))
