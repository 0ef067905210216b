"""merge: base and adapter as one 16-bit model."""

from __future__ import annotations

from infra.config import Config
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from training.config import MergeJob


class MergeConfig(Config):
    """Nothing to choose yet: the merge is exact to the rounding of the base's dtype."""


def step(spec: Spec) -> Step:
    """The step that needs the base model and the adapter."""
    return Step("merge", 1, "merged", MergeConfig(), run, needs={"base": "base", "train": "adapter"})


def run(config: MergeConfig, context: StepContext) -> None:
    """Merges tensor by tensor."""
    job = context.job(MergeJob, base_dir=context.inputs["base"].path, adapter_dir=context.inputs["train"].path)
    context.run_program("training.merge", job)
