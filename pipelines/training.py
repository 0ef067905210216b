"""`slipway train`: the steps up to the trained model alone, or what they would cost."""

from __future__ import annotations

from typing import Any

from infra.artifact_store import open_store
from infra.files import read_json
from infra.provenance import capture
from infra.settings import Settings
from pipelines import graph, preflight, runner
from pipelines.display import Display
from pipelines.executors.base import make_executor
from pipelines.pipeline import make_run_dir, tracked_run
from pipelines.plan import build_steps
from pipelines.report import TRAINING_NAME
from pipelines.spec import Spec
from training.config import EstimateJob

ESTIMATE_MODULE = "training.estimate"
ESTIMATE_NAME = "estimate.json"


def train(spec: Spec, settings: Settings, display: Display) -> dict[str, Any]:
    """Makes the adapter, or the whole model; its figures and where it lies."""
    steps = graph.upto(build_steps(spec), "train")
    planned = runner.plan(settings, steps)
    preflight.check(spec, planned, settings, will_serve=False)
    run_dir = make_run_dir(spec, settings)
    with runner.started_ahead(settings, planned, run_dir) as ahead, tracked_run(spec, settings, run_dir) as tracked:
        display.note(f"[bold]{spec.name}[/bold]  run {tracked.run_id}  in {run_dir}")
        outcome = runner.run(settings, steps, run_dir, capture(spec.fingerprint, tracked.run_id), tracked, display, ahead)
    made = outcome.artifacts["train"]
    runner.bring_whole(settings, made)
    figures = read_json(made.path / TRAINING_NAME)
    return {
        "run_id": tracked.run_id,
        "path": str(made.path),
        "digest": made.manifest.digest,
        "training": figures,
        "timings_s": outcome.timings_s,
    }


def estimate(spec: Spec, settings: Settings, display: Display) -> dict[str, Any]:
    """Memory and time of the training step, from its data and a few steps of it. Raises ConfigError where it cannot fit."""
    steps = graph.upto(build_steps(spec), "render")
    preflight.check(spec, runner.plan(settings, steps), settings, will_serve=False)
    run_dir = make_run_dir(spec, settings)
    outcome = runner.run(settings, steps, run_dir, capture(spec.fingerprint), None, display)
    job = EstimateJob(
        output_dir=run_dir / "estimate",
        base_dir=outcome.artifacts["base"].path,
        tokens_dir=outcome.artifacts["render"].path,
        train=spec.train,
    )
    make_executor(settings).run_to_end(ESTIMATE_MODULE, job, run_dir / "estimate.job.json", run_dir / "estimate.log", lambda: None)
    if settings.store:
        open_store(settings.store).place.remove(f"{settings.runs_dir.name}/{run_dir.name}")  # the order, as after a step
    found: dict[str, Any] = read_json(job.output_dir / ESTIMATE_NAME)
    return found
