"""A program like those of the stacks, but light: what the executor's tests run as a RayJob, in a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path

from infra.contracts import write_manifest
from infra.errors import ConfigError
from infra.process import Job, Progress, run_program


class ToyJob(Job):
    """What it is told."""

    text: str = "made"
    num_steps: int = 3
    step_s: float = 0.05
    fails_by: str | None = None
    """Text of a known error that it ends by."""
    hangs_once_in: Path | None = None
    """Folder in which it leaves a mark, and hangs where there was none: the run that a test ends."""


def make(job: ToyJob) -> None:
    """Reports some steps and writes one file."""
    print(f"toy step of process {os.getpid()} begins", flush=True)
    if job.hangs_once_in is not None:
        mark = job.hangs_once_in / "mark"
        if not mark.exists():
            mark.touch()
            time.sleep(600)
    progress = Progress(job.progress_file, "steps")
    for number in range(job.num_steps):
        progress.report(number + 1, job.num_steps)
        time.sleep(job.step_s)
    if job.fails_by:
        raise ConfigError(job.fails_by)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    (job.output_dir / "text").write_text(job.text)
    write_manifest(job.output_dir, "dataset", job.provenance)
    print("toy step ends", flush=True)


if __name__ == "__main__":
    run_program(ToyJob, make)
