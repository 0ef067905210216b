"""Runs the steps of a spec: skips what exists, resumes what was killed, records every step as a nested MLflow run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from infra import tracking
from infra.artifact_store import ArtifactStore, open_store
from infra.contracts import Wanted, every_file, no_weights
from infra.errors import SlipwayError
from infra.process import Job, TrackingTarget
from infra.provenance import Provenance
from infra.settings import Settings
from infra.store_cleaning import clean_files
from pipelines import store
from pipelines.display import Display
from pipelines.executors import local
from pipelines.executors.base import Executor, make_executor
from pipelines.run_record import RunRecords
from pipelines.step import Artifact, Step, StepContext

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
PROGRESS_NAME = "progress.jsonl"
Ahead = Mapping[str, local.Started]


@dataclass(frozen=True)
class Planned:
    """What a run would do with one step, and why."""

    step: Step
    will_run: bool
    reason: str
    slot: store.Slot | None = None
    """Where its output lies or will lie; None while an input is still to be made."""
    artifact: Artifact | None = None
    """The output, where it is there already."""


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of this `slipway run`."""

    client: MlflowClient
    uri: str
    experiment_id: str
    run_id: str
    records: RunRecords


@dataclass
class Outcome:
    """What the steps left: artifacts, seconds spent now, and which were there already."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def plan(settings: Settings, steps: Sequence[Step]) -> list[Planned]:
    """What running the steps would do; touches nothing. Raises ConfigError where what is there already cannot be used."""
    made: dict[str, Artifact] = {}
    planned, shelf = [], open_store(settings.store) if settings.store else None
    for step in steps:
        waiting = [name for name in step.needs if name not in made]
        if waiting:
            planned.append(Planned(step, True, f"{', '.join(waiting)} will run first"))
            continue
        inputs = {name: made[name] for name in step.needs}
        slot = store.slot(settings, step, {name: artifact.manifest.digest for name, artifact in inputs.items()})
        artifact = slot.artifact()
        shared = None if artifact or shelf is None else shelf.manifest(slot.final_dir.name)
        if artifact is not None:
            made[step.name] = artifact
            if all(each.path.is_dir() for each in inputs.values()):  # else one is in the store alone, and is looked at when it is here
                _check(step, artifact, inputs)
            planned.append(Planned(step, False, f"already made: {slot.final_dir.name}", slot, artifact))
        elif shared is not None:
            made[step.name] = Artifact(slot.final_dir, shared)
            planned.append(Planned(step, False, f"already made, in the store: {slot.final_dir.name}", slot, made[step.name]))
        elif slot.staging_dir.exists():
            planned.append(Planned(step, True, "an attempt was cut off; it resumes", slot))
        else:
            planned.append(Planned(step, True, "not made yet", slot))
    return planned


@contextlib.contextmanager
def started_ahead(settings: Settings, planned: Sequence[Planned], run_dir: Path) -> Iterator[Ahead]:
    """Where only the last step is left to be made, its program starts now, for the block: opening MLflow takes 2.5 s, and Ray 3."""
    *before, last = planned
    if last.artifact is not None or last.slot is None or settings.executor != "local":
        yield {}
        return
    made = {each.step.name: each.artifact for each in before if each.artifact is not None}
    programs: list[tuple[str, Job]] = []
    inputs = {name: made[name] for name in last.step.needs}
    context = StepContext(
        output_dir=last.slot.output_dir,
        inputs=inputs,
        provenance=Provenance(),
        tracking=None,
        progress_file=last.slot.staging_dir / PROGRESS_NAME,
        run_program=lambda module, job: programs.append((module, job)),
    )
    last.step.run(last.step.config, context)
    ((module, draft),) = programs
    with local.started_ahead(module, draft, run_dir, _log_file(run_dir, last.step)) as started:
        yield {last.step.name: started}


def run(
    settings: Settings,
    steps: Sequence[Step],
    run_dir: Path,
    provenance: Provenance,
    tracked: Tracked | None,
    display: Display,
    ahead: Ahead = MappingProxyType({}),
) -> Outcome:
    """Makes every step's artifact, in order. What a step leaves when it fails stays, so that the same command resumes."""
    outcome, executor = Outcome(), make_executor(settings)
    shelf = open_store(settings.store) if settings.store else None
    wanted = every_file if settings.executor == "local" else no_weights
    for step in steps:
        inputs = {name: outcome.artifacts[name] for name in step.needs}
        slot = store.slot(settings, step, {name: artifact.manifest.digest for name, artifact in inputs.items()})
        started_s = time.monotonic()
        artifact = slot.artifact() or _fetched(slot, shelf, wanted)
        if artifact is None:
            with slot.locked(lambda step=step: display.note(f"{step.name}: another run is making this; waiting for it")):  # type: ignore[misc]
                chosen = local.LocalExecutor(ahead[step.name]) if step.name in ahead else executor
                artifact = (
                    slot.artifact()
                    or _fetched(slot, shelf, wanted)
                    or _make(slot, step, inputs, run_dir, provenance, tracked, display, chosen)
                )
        else:
            outcome.skipped.append(step.name)
            display.skipped(step.name, slot.final_dir.name)
            if tracked is not None and (begun := tracked.records.read()) and (left := begun.steps.get(step.name)):
                tracking.end_left(tracked.client, left, _made_tags(artifact))  # its driver was killed after the last word of the step
        if shelf is not None:
            shelf.push(artifact.path)
            shelf.place.remove(f"staging/{slot.final_dir.name}")
        _check(step, artifact, inputs)
        outcome.timings_s[step.name] = round(time.monotonic() - started_s, 3)
        outcome.artifacts[step.name] = artifact
    if shelf is not None:
        _clean(shelf)
    return outcome


def _clean(shelf: ArtifactStore) -> None:
    """Takes out of the store what earlier runs have left there; all is made by now, so that a store that is away fails nothing."""
    try:
        clean_files(shelf)
    except SlipwayError as error:
        log.warning("files that no run needs any more stay in the store: %s", error.message)


def bring_whole(settings: Settings, artifact: Artifact) -> None:
    """Fetches what the store alone has of a model that this machine is to serve, sign or upload: its weights."""
    if settings.store:
        open_store(settings.store).fetch(artifact.path.name, artifact.path.parent)


def _fetched(slot: store.Slot, shelf: ArtifactStore | None, wanted: Wanted) -> Artifact | None:
    """The output from the artifact store, where another driver has made it; without what the programs of this run do not read here."""
    if shelf is None or (manifest := shelf.manifest(slot.final_dir.name)) is None:
        return None
    return Artifact(shelf.fetch(slot.final_dir.name, slot.final_dir.parent, wanted), manifest)


def _check(step: Step, artifact: Artifact, inputs: Mapping[str, Artifact]) -> None:
    if step.check is not None:
        step.check(artifact, inputs)


def _make(
    slot: store.Slot,
    step: Step,
    inputs: dict[str, Artifact],
    run_dir: Path,
    provenance: Provenance,
    tracked: Tracked | None,
    display: Display,
    executor: Executor,
) -> Artifact:
    slot.output_dir.mkdir(parents=True, exist_ok=True)
    progress_file = slot.staging_dir / PROGRESS_NAME
    progress_file.unlink(missing_ok=True)

    def run_program(module: str, job: Job) -> None:
        config_file, log_file = slot.staging_dir / "config.json", _log_file(run_dir, step)
        executor.run_to_end(module, job, config_file, log_file, lambda: display.tick(progress_file))

    def work(target: TrackingTarget | None) -> None:
        context = StepContext(slot.output_dir, inputs, provenance, target, progress_file, run_program)
        step.run(step.config, context)

    with display.step(step.name):
        if tracked is None:
            work(None)
            return slot.publish()
        begun = tracked.records.read()
        nested = begun.steps.get(step.name) or _unnoted(tracked, step.name) if begun else None
        with tracking.run(tracked.client, tracked.experiment_id, step.name, tracked.run_id, begun_run_id=nested) as run_id:
            tracked.records.begin_step(step.name, run_id)
            work(TrackingTarget(uri=tracked.uri, run_id=run_id, unsent_file=run_dir / "unsent" / f"{step.name}.jsonl"))
            artifact = slot.publish()
            for name, value in _made_tags(artifact).items():
                tracked.client.set_tag(run_id, name, value)
            return artifact


def _made_tags(artifact: Artifact) -> dict[str, str]:
    return {"slipway.artifact": str(artifact.path), "slipway.digest": artifact.manifest.digest}


def _unnoted(tracked: Tracked, name: str) -> str | None:
    """The step's run that a driver had made, and was killed before it could note it."""
    return tracking.find_run(tracked.client, tracked.experiment_id, name, {tracking.PARENT_TAG: tracked.run_id})


def _log_file(run_dir: Path, step: Step) -> Path:
    return run_dir / "logs" / f"{step.name}.log"
