"""`python -m training.harness --config F`: tasks of lm-evaluation-harness on a base or merged model.

What a task needs from the hub must lie in its cache already, for programs run offline; a task of one's own brings its rows as files.
"""

from __future__ import annotations

from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from infra.contracts import verify, write_manifest
from infra.errors import ConfigError
from infra.evaluation.tasks import TASKS_NAME, TaskFigure, task_key
from infra.files import write_json_atomic
from infra.process import Progress, run_program
from training.folders import fresh_folder
from training.harness_config import HarnessJob
from training.model import load_base
from training.precision import compute_dtype

BOOTSTRAP_DRAWS = 1000  # of the figures that are no means; the harness's own default takes minutes


def run_tasks(job: HarnessJob) -> None:
    """Writes tasks.json. Raises ConfigError for a task that the harness does not have or whose rows it cannot read."""
    manifest = verify(job.model_dir, ("base", "merged"))
    manager = TaskManager(include_path=str(job.tasks.folder) if job.tasks.folder else None)
    if unknown := [name for name in job.tasks.names if name not in manager.all_tasks]:
        raise ConfigError(f"evaluate.lm_eval.names: the harness has no {', '.join(unknown)}. `lm-eval ls tasks` lists those it has.")
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
    model = HFLM(pretrained=load_base(job.model_dir, compute_dtype(job.precision), "eager"), tokenizer=tokenizer, batch_size=job.batch_rows)
    progress = Progress(job.progress_file, "tasks")
    fresh_folder(job.output_dir)
    found: dict[str, Any] = {}
    for number, name in enumerate(job.tasks.names, start=1):
        found |= figures(_evaluated(model, name, manager, job))
        progress.report(number, len(job.tasks.names))
    write_json_atomic(job.output_dir / TASKS_NAME, found)
    write_manifest(job.output_dir, "scores", job.provenance, parents={"model": manifest.digest})


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the harness's results by our name for it."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            figure = TaskFigure(
                value=value,
                stderr=error if isinstance(error, (int, float)) else None,
                n=results["n-samples"][task]["effective"],
                is_better_higher=results["higher_is_better"][task].get(metric, True) is not False,
            )
            found[task_key(task, metric, kind)] = figure.model_dump(mode="json")
    return found


def _evaluated(model: Any, name: str, manager: Any, job: HarnessJob) -> dict[str, Any]:
    try:
        return dict(
            simple_evaluate(
                model=model,
                tasks=[name],
                limit=job.tasks.limit_rows,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
            )
        )
    except (OSError, ValueError) as error:  # how `datasets` says that rows are not there
        raise ConfigError(
            f"evaluate.lm_eval: the rows of {name!r} cannot be read: {error}. Load them into the hub's cache first."
        ) from error


if __name__ == "__main__":
    run_program(HarnessJob, run_tasks)
