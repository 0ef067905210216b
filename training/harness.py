"""`python -m training.harness --config F`: tasks of lm-evaluation-harness on a base or merged model."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from infra.contracts import verify, write_manifest
from infra.evaluation.harness import open_tasks, task_figures
from infra.evaluation.tasks import TASKS_NAME
from infra.files import write_json_atomic
from infra.process import Progress, run_program
from training.folders import fresh_folder
from training.harness_config import HarnessJob
from training.model import load_base
from training.precision import compute_dtype


def run_tasks(job: HarnessJob) -> None:
    """Writes tasks.json. Raises ConfigError for a task that the harness does not have or whose rows it cannot read."""
    manifest = verify(job.model_dir, ("base", "merged"))
    manager = open_tasks(job.tasks)
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
    model = HFLM(pretrained=load_base(job.model_dir, compute_dtype(job.precision), "eager"), tokenizer=tokenizer, batch_size=job.batch_rows)
    fresh_folder(job.output_dir)
    figures = task_figures(model, job.tasks, manager, Progress(job.progress_file, "tasks").report)
    write_json_atomic(job.output_dir / TASKS_NAME, figures)
    write_manifest(job.output_dir, "scores", job.provenance, parents={"model": manifest.digest})


if __name__ == "__main__":
    run_program(HarnessJob, run_tasks)
