"""`python -m serving.batch --config F`: answers to files of requests."""

from __future__ import annotations

from infra.process import run_program
from serving.batch.run import run
from serving.config import BatchJob

if __name__ == "__main__":
    run_program(BatchJob, run)
