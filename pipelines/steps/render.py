"""render: rows as token ids and labels, with the receipt of what was lost."""

from __future__ import annotations

from collections.abc import Mapping

from infra.config import Config
from pipelines import serveable
from pipelines.spec import Spec
from pipelines.step import Artifact, Step, StepContext
from training.config import DataConfig, RenderJob


class RenderConfig(Config):
    """Identity of a rendering."""

    data: DataConfig
    train_limit_rows: int | None


def step(spec: Spec) -> Step:
    """The step that needs rows and the base model's tokenizer."""
    config = RenderConfig(data=spec.data, train_limit_rows=spec.train_limit_rows)

    def check(made: Artifact, inputs: Mapping[str, Artifact]) -> None:
        serveable.check_prompts(spec, inputs["base"].path, made.path)

    return Step("render", 4, "tokens", config, run, needs={"rows": "dataset", "base": "base"}, check=check)


def run(config: RenderConfig, context: StepContext) -> None:
    """Renders with the base model's own chat template."""
    job = context.job(
        RenderJob,
        base_dir=context.inputs["base"].path,
        rows_dir=context.inputs["rows"].path,
        data=config.data,
        train_limit_rows=config.train_limit_rows,
    )
    context.run_program("training.data.render", job)
