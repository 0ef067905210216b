"""train: an adapter, or with full fine-tuning the whole model, by Ray Train."""

from __future__ import annotations

from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from training.config import FinetuneJob, TrainConfig


def step(spec: Spec) -> Step:
    """The step that needs the tokens and the base model."""
    return Step(
        "train", 4, "merged" if spec.train.method == "full" else "adapter", spec.train, run, needs={"render": "tokens", "base": "base"}
    )


def run(config: TrainConfig, context: StepContext) -> None:
    """Fine-tunes; a killed attempt resumes from its last checkpoint."""
    job = context.job(FinetuneJob, base_dir=context.inputs["base"].path, tokens_dir=context.inputs["render"].path, train=config)
    context.run_program("training.finetune", job)
