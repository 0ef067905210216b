"""repeat-*: a candidate for serving answers some rows a second time, so that the noise of its figures is known."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps.predict import PredictServedConfig, served_config
from serving import config as serving


class RepeatConfig(PredictServedConfig):
    """Identity of answers given again."""

    limit_rows: int


def steps(spec: Spec) -> list[Step]:
    """One step a candidate; none where nothing is to be repeated."""
    return [_candidate(spec, weight_format) for weight_format in spec.quantize.formats] if spec.evaluate.repeated_rows else []


def run(engine_python: Path | None, config: RepeatConfig, context: StepContext) -> None:
    """The same engine as in predict-*, started anew; fewer rows run together, which is what may change an answer."""
    job = context.job(
        serving.PredictJob,
        model_dir=context.input_of_kind("quantized").path,
        tokens_dir=context.inputs["render"].path,
        max_new_tokens=config.max_new_tokens,
        limit_rows=config.limit_rows,
        serve=serving.ServeConfig(engine=config.engine, precision=config.precision, engine_python=engine_python),
    )
    context.run_program("serving.predict", job)


def _candidate(spec: Spec, weight_format: str) -> Step:
    config, python = served_config(spec, weight_format)
    repeated = RepeatConfig(**{**config.model_dump(), "score_expected": False, "latency_rows": 0}, limit_rows=spec.evaluate.repeated_rows)
    needs = {"render": "tokens", f"quantize-{weight_format}": "quantized"}
    return Step(f"repeat-{weight_format}", 2, "answers", repeated, partial(run, python), needs=needs)  # type: ignore[arg-type]
