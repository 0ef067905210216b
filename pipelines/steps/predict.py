"""predict-*: greedy answers of each model to the same held-out token ids, each by the stack that will run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from infra.config import Config
from infra.contracts import Kind
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from serving import config as serving
from training import config as training


class PredictConfig(Config):
    """Identity of a set of answers."""

    max_new_tokens: int


def steps(spec: Spec) -> list[Step]:
    """One step a model: base, adapter if one is trained, merged and the served format."""
    config = PredictConfig(max_new_tokens=spec.evaluate.max_new_tokens)

    def node(name: str, run: Callable[[Any, StepContext], None], needs: Mapping[str, Kind]) -> Step:
        return Step(f"predict-{name}", 1, "answers", config, run, needs={"render": "tokens", **needs})

    with_adapter = [node("adapter", run_adapter, {"base": "base", "train": "adapter"})] if spec.merged_by == "merge" else []
    return [
        node("base", run_base, {"base": "base"}),
        *with_adapter,
        node("merged", run_merged, {spec.merged_by: "merged"}),
        node(spec.quantize.format, run_quantized, {"quantize": "quantized"}),
    ]


def run_base(config: PredictConfig, context: StepContext) -> None:
    """The base model, in the training stack."""
    _run_training(config, context, model_dir=context.inputs["base"].path)


def run_adapter(config: PredictConfig, context: StepContext) -> None:
    """The base model with the adapter on it, in the training stack."""
    _run_training(config, context, model_dir=context.inputs["base"].path, adapter_dir=context.inputs["train"].path)


def run_merged(config: PredictConfig, context: StepContext) -> None:
    """The merged model, in the training stack."""
    _run_training(config, context, model_dir=context.input_of_kind("merged").path)


def run_quantized(config: PredictConfig, context: StepContext) -> None:
    """The quantized model, in the engine that will serve it."""
    job = context.job(
        serving.PredictJob,
        model_dir=context.inputs["quantize"].path,
        tokens_dir=context.inputs["render"].path,
        max_new_tokens=config.max_new_tokens,
    )
    context.run_program("serving.predict", job)


def _run_training(config: PredictConfig, context: StepContext, **models: Any) -> None:
    job = context.job(training.PredictJob, tokens_dir=context.inputs["render"].path, max_new_tokens=config.max_new_tokens, **models)
    context.run_program("training.predict", job)
