"""predict-*: greedy answers of each model to the same held-out token ids, each by the stack that will run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from infra.config import Config
from infra.contracts import Kind
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from serving import config as serving
from serving.limits import ENGINE_OF_FORMAT, with_engine_of
from training import config as training

TIMED_STREAMS = (1, 16)
"""Requests at once at which each candidate is timed."""


class PredictConfig(Config):
    """Identity of a set of answers."""

    max_new_tokens: int
    score_expected: bool = False
    """Whether it is also computed how likely the expected answers are."""


class PredictServedConfig(PredictConfig):
    """Identity of the answers of an engine."""

    engine: serving.EngineName
    precision: serving.Precision
    latency_rows: int
    """Answers that are timed alone."""


def steps(spec: Spec) -> list[Step]:
    """One step a model: base, adapter if one is trained, merged and each candidate for serving."""
    config = PredictConfig(max_new_tokens=spec.evaluate.max_new_tokens, score_expected=wants_likelihoods(spec))

    def node(name: str, run: Callable[[Any, StepContext], None], needs: Mapping[str, Kind]) -> Step:
        return Step(f"predict-{name}", 1, "answers", config, run, needs={"render": "tokens", **needs})

    with_adapter = [node("adapter", run_adapter, {"base": "base", "train": "adapter"})] if spec.merged_by == "merge" else []
    return [
        node("base", run_base, {"base": "base"}),
        *with_adapter,
        node("merged", run_merged, {spec.merged_by: "merged"}),
        *(_candidate(spec, weight_format) for weight_format in spec.quantize.formats),
    ]


def wants_likelihoods(spec: Spec) -> bool:
    """Whether a metric is asked for that needs them."""
    return "perplexity" in spec.evaluate.metrics


def wants_latencies(spec: Spec) -> bool:
    """Whether a metric or a gate reads how long an answer takes."""
    return "latency_s" in spec.evaluate.metrics or spec.gates.max_latency_s is not None


def served_config(spec: Spec, weight_format: str) -> tuple[PredictServedConfig, Path | None]:
    """What decides the answers of a candidate, which the engine that would serve it gives, and that engine's Python if it has its own."""
    serve, engine = with_engine_of(spec.serve, weight_format), ENGINE_OF_FORMAT[weight_format]
    config = PredictServedConfig(
        max_new_tokens=spec.evaluate.max_new_tokens,
        score_expected=wants_likelihoods(spec),
        engine=engine,
        precision=serve.precision,
        latency_rows=spec.evaluate.latency_rows if wants_latencies(spec) else 0,
    )
    return config, serve.engine_python if serve.engine == engine else None


def _candidate(spec: Spec, weight_format: str) -> Step:
    """The step of one candidate."""
    config, python = served_config(spec, weight_format)
    name = f"quantize-{weight_format}"
    run = partial(run_quantized, name, python)
    return Step(f"predict-{weight_format}", 3, "answers", config, run, needs={"render": "tokens", name: "quantized"})


def run_base(config: PredictConfig, context: StepContext) -> None:
    """The base model, in the training stack."""
    _run_training(config, context, model_dir=context.inputs["base"].path)


def run_adapter(config: PredictConfig, context: StepContext) -> None:
    """The base model with the adapter on it, in the training stack."""
    _run_training(config, context, model_dir=context.inputs["base"].path, adapter_dir=context.inputs["train"].path)


def run_merged(config: PredictConfig, context: StepContext) -> None:
    """The merged model, in the training stack."""
    _run_training(config, context, model_dir=context.input_of_kind("merged").path)


def run_quantized(name: str, engine_python: Path | None, config: PredictServedConfig, context: StepContext) -> None:
    """A quantized model, in the engine that would serve it, which is timed as well."""
    job = context.job(
        serving.PredictJob,
        model_dir=context.inputs[name].path,
        tokens_dir=context.inputs["render"].path,
        max_new_tokens=config.max_new_tokens,
        score_expected=config.score_expected,
        serve=serving.ServeConfig(engine=config.engine, precision=config.precision, engine_python=engine_python),
        timed_streams=TIMED_STREAMS,
        latency_rows=config.latency_rows,
    )
    context.run_program("serving.predict", job)


def _run_training(config: PredictConfig, context: StepContext, **models: Any) -> None:
    job = context.job(training.PredictJob, tokens_dir=context.inputs["render"].path, **config.model_dump(), **models)
    context.run_program("training.predict", job)
