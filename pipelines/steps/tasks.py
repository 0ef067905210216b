"""tasks-*: general tasks of lm-evaluation-harness, which show what fine-tuning, and then the served format, made the model forget.

Base and merged model do them in the training stack, each candidate in the engine that would serve it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from infra.config import Config
from infra.evaluation.tasks import TasksConfig
from infra.files import sha256_file, sha256_json
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import TRAINING_TASK_MODELS, candidate_names
from pipelines.steps.predict import served_config
from serving import config as serving
from serving import harness_config as served_harness
from training import harness_config as training_harness


class TasksStepConfig(Config):
    """Identity of the figures."""

    tasks: TasksConfig


class ServedTasksConfig(TasksStepConfig):
    """Identity of the figures of an engine."""

    engine: serving.EngineName
    precision: serving.Precision


def steps(spec: Spec) -> list[Step]:
    """One step a model; none where the spec names no tasks."""
    tasks = spec.evaluate.lm_eval
    if tasks is None:
        return []
    sources = {"tasks": sha256_json(_digests(tasks.folder))}
    config = TasksStepConfig(tasks=tasks)
    makers = {"base": "base", "merged": spec.merged_by}
    trained = [
        Step(f"tasks-{name}", 1, "scores", config, run, needs={makers[name]: name}, source_digests=sources)  # type: ignore[dict-item]
        for name in TRAINING_TASK_MODELS
    ]
    return [*trained, *(_candidate(spec, tasks, name, sources) for name in candidate_names(spec) if tasks.on_served)]


def run(config: TasksStepConfig, context: StepContext) -> None:
    """Runs the harness in the training stack."""
    (model,) = context.inputs.values()
    context.run_program("training.harness", context.job(training_harness.HarnessJob, model_dir=model.path, tasks=config.tasks))


def run_served(engine_python: Path | None, config: ServedTasksConfig, context: StepContext) -> None:
    """Runs the harness in the serving stack."""
    (model,) = context.inputs.values()
    serve = serving.ServeConfig(engine=config.engine, precision=config.precision, engine_python=engine_python)
    context.run_program("serving.harness", context.job(served_harness.HarnessJob, model_dir=model.path, tasks=config.tasks, serve=serve))


def _candidate(spec: Spec, tasks: TasksConfig, name: str, sources: dict[str, str]) -> Step:
    answers, python = served_config(spec, name)
    config: Any = ServedTasksConfig(tasks=tasks, engine=answers.engine, precision=answers.precision)
    return Step(
        f"tasks-{name}", 2, "scores", config, partial(run_served, python), needs={f"quantize-{name}": "quantized"}, source_digests=sources
    )


def _digests(folder: Path | None) -> dict[str, str]:
    files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: sha256_file(path) for path in files}
