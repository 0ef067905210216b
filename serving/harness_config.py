"""What the program that runs lm-evaluation-harness on a served model is told; light, for the driver writes it."""

from __future__ import annotations

from pathlib import Path

from infra.evaluation.tasks import TasksConfig
from infra.process import Job
from serving.config import ServeConfig


class HarnessJob(Job):
    """`python -m serving.harness`: tasks of lm-evaluation-harness on one model that may be served."""

    model_dir: Path
    tasks: TasksConfig
    serve: ServeConfig = ServeConfig()
    """The engine, and what it may use."""
