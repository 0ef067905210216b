"""tasks-*: general tasks of lm-evaluation-harness on base and merged model, which show what fine-tuning made it forget."""

from __future__ import annotations

from infra.config import Config
from infra.evaluation.tasks import TasksConfig
from infra.files import sha256_file, sha256_json
from pipelines.spec import Spec
from pipelines.step import Step, StepContext
from pipelines.steps.evaluate import TASK_MODELS
from training.harness_config import HarnessJob


class TasksStepConfig(Config):
    """Identity of the figures."""

    tasks: TasksConfig


def steps(spec: Spec) -> list[Step]:
    """One step a model; none where the spec names no tasks."""
    tasks = spec.evaluate.lm_eval
    if tasks is None:
        return []
    folder = tasks.folder
    files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {"tasks": sha256_json({path.name: sha256_file(path) for path in files})}
    config = TasksStepConfig(tasks=tasks)
    makers = {"base": "base", "merged": spec.merged_by}
    return [
        Step(f"tasks-{name}", 1, "scores", config, run, needs={makers[name]: name}, source_digests=digests)  # type: ignore[dict-item]
        for name in TASK_MODELS
    ]


def run(config: TasksStepConfig, context: StepContext) -> None:
    """Runs the harness in the training stack."""
    (model,) = context.inputs.values()
    context.run_program("training.harness", context.job(HarnessJob, model_dir=model.path, tasks=config.tasks))
