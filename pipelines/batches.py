"""Starts offline answers on a model folder; the stack itself is never imported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.files import read_json
from infra.process import Job
from infra.provenance import capture
from infra.settings import Settings
from pipelines.display import Display
from pipelines.executors import local
from pipelines.serve import with_engine
from pipelines.target import Target
from serving.config import BATCH_MANIFEST_NAME, BatchJob


def answer(target: Target, source: Path, output_dir: Path, settings: Settings, display: Display) -> dict[str, Any]:
    """Answers the requests in `source` into `output_dir`, or what is missing of them, and gives the result as the manifest there has it.

    Raises ConfigError on bad input or a folder of another batch, ArtifactError on a bad model, TransientError where it can be resumed.
    """
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder. Requests are needed: files .jsonl or .parquet, or a folder of them.")
    run_dir = settings.runs_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-batch-{target.name}"
    job: Job = BatchJob(
        output_dir=output_dir.absolute(),
        progress_file=run_dir / "progress.jsonl",
        provenance=capture(),
        model_dir=target.model_dir.absolute(),
        model_name=target.name,
        input=source.absolute(),
        serve=with_engine(target.serve, target.model_dir),
        batch=target.batch,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    with display.step("batch"):
        local.run_to_end(
            "serving.batch", job, run_dir / "config.json", run_dir / "batch.log", lambda: display.tick(run_dir / "progress.jsonl")
        )
    return dict(read_json(output_dir / BATCH_MANIFEST_NAME)["result"])
