"""`python -m pipelines.proof.asking --config F`: starts the server as it is started to serve, asks it every chat, and stops it.

A program of its own, so that it runs where the engine is: a driver on another machine needs none.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from infra.cases import read_cases, write_lines
from infra.network import free_port
from infra.process import Job, run_program
from pipelines.proof import endpoint
from pipelines.serve import serving_in
from serving.config import ServeConfig

MODEL_NAME = "certificate"
ANSWERS_NAME = "live.jsonl"


class AskJob(Job):
    """What to ask of which model."""

    model_dir: Path
    cases_dir: Path
    """Folder with the chats."""
    serve: ServeConfig
    heldout_tokens: int = Field(ge=1)
    """Longest answer to a held-out row, in tokens."""
    adversarial_tokens: int = Field(ge=1)
    """Longest answer to another chat."""


def ask(job: AskJob) -> None:
    """Writes one answer a chat. Raises ArtifactError where the model is not whole, TransientError where the server does not start."""
    cases = read_cases(job.cases_dir)
    asked = [(case, job.adversarial_tokens if case.kind == "adversarial" else job.heldout_tokens) for case in cases]
    folder = job.output_dir.parent.parent / f"live-{job.output_dir.name}"  # its log is no part of the artifact
    with serving_in(folder, job.model_dir, MODEL_NAME, job.serve.model_copy(update={"port": free_port()})) as served:
        answers = endpoint.ask_all(served.url, served.model_name, asked)
    write_lines(job.output_dir / ANSWERS_NAME, answers)


if __name__ == "__main__":
    run_program(AskJob, ask)
