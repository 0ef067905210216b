"""`slipway merge|quantize|evaluate`: the steps up to one stage, from the same spec and with the same artifacts as a whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from infra.files import read_json
from infra.process import disk_full_as_known_error
from infra.provenance import capture
from infra.settings import Settings, load_settings
from pipelines import graph, preflight, runner
from pipelines.display import Display, score_table
from pipelines.pipeline import make_run_dir, tracked_run
from pipelines.plan import build_steps
from pipelines.spec import Spec, load_spec
from pipelines.step import Step
from pipelines.steps.evaluate import SCORES_NAME


def show(stage: str, path: Path, overrides: list[str], as_json: bool, quiet: bool, executor: str | None = None) -> None:
    """Makes the stage's artifacts and prints where they lie."""
    settings, spec = load_settings(executor), load_spec(path, overrides)
    with disk_full_as_known_error():
        result = make(stage, spec, settings, Display(quiet))
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    if "scores" in result:
        console.print(score_table(result["scores"]))
    for name, made in result["artifacts"].items():
        console.print(f"{name}  {made['path']}", soft_wrap=True)


def make(stage: str, spec: Spec, settings: Settings, display: Display) -> dict[str, Any]:
    """The artifacts of the stage, with where they lie, their digests and, of `evaluate`, the scores."""
    every = build_steps(spec)
    ends = ends_of(stage, spec, every)
    wanted = {step.name for end in ends for step in graph.upto(every, end)}
    steps = [step for step in every if step.name in wanted]
    preflight.check(spec, runner.plan(settings, steps), settings, will_serve=False)
    run_dir = make_run_dir(spec, settings)
    with tracked_run(spec, settings, run_dir) as tracked:
        display.note(f"[bold]{spec.name}[/bold]  run {tracked.run_id}  in {run_dir}")
        outcome = runner.run(settings, steps, run_dir, capture(spec.fingerprint, tracked.run_id), tracked, display)
    made = {name: outcome.artifacts[name] for name in ends}
    for each in made.values():
        runner.bring_whole(settings, each)
    result = {
        "run_id": tracked.run_id,
        "artifacts": {name: {"path": str(each.path), "digest": each.manifest.digest} for name, each in made.items()},
        "timings_s": outcome.timings_s,
    }
    return result | ({"scores": read_json(made["evaluate"].path / SCORES_NAME)} if stage == "evaluate" else {})


def ends_of(stage: str, spec: Spec, steps: Sequence[Step]) -> list[str]:
    """The steps that a stage ends with: one, but for candidates in several weight formats."""
    if stage == "merge":
        return [spec.merged_by]
    return [step.name for step in steps if step.name == stage or step.name.startswith(f"{stage}-")]
