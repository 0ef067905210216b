"""Answers every row of the input that has no answer yet, with a pool of engines under Ray Data.

- Model, input and folder are checked before Ray starts; a run over what is complete starts nothing.
- Ray Data hands the parts out in order; a worker that is lost is replaced and its parts are answered again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from infra.contracts import read_manifest
from infra.errors import ConfigError, SlipwayError, TransientError
from infra.local_ray import local_ray
from infra.process import Progress
from infra.repeated import repeated
from serving.adapters import require_adapters, with_absolute_adapters
from serving.batch.answers import Tally
from serving.batch.folder import BatchFolder, Manifest, Result, Settings
from serving.batch.journal import JournalReader
from serving.batch.parts import Part, make_plan
from serving.config import BatchFormat, BatchJob, ServeConfig
from serving.cores import require_gpus, with_cores
from serving.engines.registry import verify_model
from serving.interpreter import engine_python
from serving.process_tree import adopt_orphans, end_children
from serving.trust import require_all_trusted, settled_trust

OBJECT_STORE_BYTES = 80_000_000  # Ray's smallest is 75 MB; no row ever passes through it
LOOK_INTERVAL_S = 1.0
TOKENS_INTERVAL_S = 0.25  # nobody reads along; only stop strings are looked for as tokens come


def run(job: BatchJob) -> None:
    """Answers `job.input` into `job.output_dir` and writes the result into its manifest.

    Raises ArtifactError and ConfigError (an adapter of another base, say) before anything starts, TransientError where it ends early and
    can be resumed.
    """
    started_s = time.monotonic()
    if job.serve.pools:
        raise ConfigError("serve.pools: a batch has engines of one kind. Set serve.pools=[], and what they have in common.")
    model = verify_model(job.model_dir, job.serve)
    require_adapters(job.serve, job.model_dir, model)
    require_all_trusted(job.model_dir, job.model_name, settled_trust(job.serve))
    job = _settled(job)
    _require_apart(job)
    plan = make_plan(job.input, job.batch.rows_per_part)
    settings = make_settings(job, model.digest, plan.format)
    manifest = Manifest(input=plan.files, settings=settings, provenance=job.provenance)
    folder = BatchFolder(job.output_dir)
    with folder.locked():
        folder.begin(manifest)
        done = folder.done(plan.parts, settings)
        missing = [part for part in plan.parts if part.number not in done]
        watch = Watch(folder, done, plan.num_rows, Progress(job.progress_file, "rows"))
        if missing:
            with watch.running():
                answer_parts(job, settings, missing)
        done = folder.done(plan.parts, settings)
        if lost := len(plan.parts) - len(done):
            raise TransientError(f"{folder.path}: {lost} part(s) have gone while this ran. Run the same command again.")
        result = Result(
            **asdict(total(done)),
            rows_answered_now=sum(part.num_rows for part in missing),
            seconds=round(time.monotonic() - started_s, 3),
            tokens_per_s=watch.tokens_per_s,
        )
        folder.finish(manifest.model_copy(update={"result": result}))


def _settled(job: BatchJob) -> BatchJob:
    """The job with cores, the engine's Python and its folders settled. Raises ConfigError: too few cores, no Python with the engine."""
    (config,) = with_cores([with_absolute_adapters(job.serve)])
    serve = config.model_copy(update={"engine_python": engine_python(config), "stream_interval_s": TOKENS_INTERVAL_S})
    return job.model_copy(update={"serve": serve, "output_dir": job.output_dir.absolute()})


def make_settings(job: BatchJob, model_digest: str, input_format: BatchFormat) -> Settings:
    """What of the job decides the answers."""
    limits = job.serve.model_dump(include=(Settings.model_fields.keys() & ServeConfig.model_fields.keys()) - {"adapters"})
    batch = job.batch.model_dump() | {"format": job.batch.format or input_format}
    adapters = {name: read_manifest(folder).digest for name, folder in job.serve.adapters.items()}
    return Settings(model_name=job.model_name, model_digest=model_digest, adapters=adapters, **limits, **batch)


def _require_apart(job: BatchJob) -> None:
    """Raises ConfigError where the answers would become requests of the next run."""
    source = job.input.absolute()
    if source == job.output_dir or source in job.output_dir.parents:
        raise ConfigError(f"{job.output_dir}: lies in {source}, from which requests are read. Name a folder outside of it.")


def answer_parts(job: BatchJob, settings: Settings, parts: Sequence[Part]) -> None:
    """Answers and writes the parts. Raises the known error of a worker, TransientError where Ray fails."""
    adopt_orphans()
    num_workers = min(job.serve.most_replicas, len(parts))
    cpus = job.serve.cpus_per_replica or 1
    try:
        with local_ray(num_workers * cpus, OBJECT_STORE_BYTES):
            _answer_on_ray(job, settings, parts, num_workers, cpus)
    finally:
        end_children()


def _answer_on_ray(job: BatchJob, settings: Settings, parts: Sequence[Part], num_workers: int, cpus: int) -> None:
    import ray
    import ray.data
    from ray.exceptions import RayError

    from serving.batch.actor import PartAnswerer
    from serving.batch.worker import open_parts

    require_gpus([job.serve], num_found=int(ray.cluster_resources().get("GPU", 0)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = int(job.serve.start_timeout_s)  # or the first one up would be given most of a short input
    num_parts = open_parts(job.serve, settings.rows_per_part)
    pool = ray.data.ActorPoolStrategy(
        size=num_workers,
        max_concurrent_calls_per_actor=num_parts,
        max_tasks_in_flight_per_actor=num_parts + 1,
        enable_true_multi_threading=True,
    )
    dataset = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map_batches(
        PartAnswerer,
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=cpus,
        num_gpus=job.serve.gpus_per_replica,
        fn_constructor_args=(job.model_dump_json(), settings.model_dump_json()),
    )
    try:
        for _ in dataset.iter_batches(batch_size=None):
            pass
    except RayError as error:
        raise known_error(error) from error


def known_error(error: BaseException) -> SlipwayError:
    """What a worker raised on purpose, under what Ray wraps it in; else that Ray failed."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, SlipwayError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    return TransientError(f"a worker failed: {error}. Run the same command again to resume.")


def total(tallies: Mapping[int, Tally]) -> Tally:
    """All parts together."""
    whole = Tally()
    for tally in tallies.values():
        whole.add(tally)
    return whole


class Watch:
    """Reports every second how far the workers are."""

    def __init__(self, folder: BatchFolder, done: Mapping[int, Tally], num_rows: int, progress: Progress) -> None:
        self._before = total(done)
        self._notes = JournalReader(folder.work)
        self._num_rows = num_rows
        self._progress = progress
        self._num_tokens = 0
        self._begun_s: float | None = None
        self.tokens_per_s: float | None = None
        """New tokens of rows that are done, by the time since the first part was begun."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Looks while the block runs, and once more at its end."""
        with repeated(self._look, LOOK_INTERVAL_S, "watch"):
            yield

    def _look(self) -> None:
        self._notes.look()
        now = total({number: note.tally for number, note in self._notes.notes.items()})
        now_s = time.monotonic()
        if self._begun_s is None and self._notes.notes:
            self._begun_s = now_s
        elif self._begun_s is not None and now.completion_tokens > self._num_tokens:
            self.tokens_per_s = round(now.completion_tokens / (now_s - self._begun_s), 1)
        self._num_tokens = now.completion_tokens
        now.add(self._before)
        figures = {} if self.tokens_per_s is None else {"tokens_per_s": self.tokens_per_s}
        self._progress.report(now.rows, self._num_rows, errors=now.errors, **figures)
