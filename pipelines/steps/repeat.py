"""repeat-*: a served candidate answers some rows a second time, so that its noise is known."""

from __future__ import annotations

from infra.config import Config
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from serving import config as serving


class RepeatConfig(Config):
    """Identity of answers given again."""

    max_new_tokens: int
    limit_rows: int


def steps(spec: Spec) -> list[Step]:
    """One step a candidate; none where nothing is to be repeated."""
    if not spec.evaluate.repeated_rows:
        return []
    config = RepeatConfig(max_new_tokens=spec.evaluate.max_new_tokens, limit_rows=spec.evaluate.repeated_rows)
    return [Step(f"repeat-{spec.quantize.format}", 1, "answers", config, run, needs={"render": "tokens", "quantize": "quantized"})]


def run(config: RepeatConfig, context: StepContext) -> None:
    """The same engine as in predict-*, started anew; fewer rows run together, which is what may change an answer."""
    job = context.job(
        serving.PredictJob,
        model_dir=context.input_of_kind("quantized").path,
        tokens_dir=context.inputs["render"].path,
        max_new_tokens=config.max_new_tokens,
        limit_rows=config.limit_rows,
    )
    context.run_program("serving.predict", job)
