"""What the program that runs lm-evaluation-harness is told; light, for the driver writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.evaluation.tasks import TasksConfig
from infra.process import Job


class HarnessJob(Job):
    """`python -m training.harness`: tasks of lm-evaluation-harness on one model."""

    model_dir: Path
    """Folder of the base or merged model."""
    tasks: TasksConfig
    batch_rows: int = Field(16, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic."""
