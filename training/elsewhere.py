"""Training workers on nodes that share no folder with the program that started them, nor with each other: only the artifact store.

- A worker reads the order of its program, fetches what that names, and works in a home of its own node.
- Rank 0 tells the progress from where it is, and pushes what it made; the program brings that into its own folder.
- Checkpoints go to the store at once. Word that a worker failed, or that all are to stop, goes through the store as well.
- A worker on the program's own node, or with its disk, uses the program's folders as on a laptop.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra import orders
from infra.artifact_store import ArtifactStore, open_store
from infra.errors import ArtifactError, SlipwayError
from infra.files import write_json_atomic, write_text_atomic
from infra.mirror import mirrored
from infra.orders import KnownError, Order, Result, beside
from infra.process import Remote
from infra.settings import load_settings
from training.config import FinetuneJob
from training.folders import checkpoints_folder, fresh_folder

FAILURE_NAME = "failure.json"
STOP_NAME = "stop"
MARK_NAME = "driver"  # tells a worker whether it sees the program's own disk


def settled(job: FinetuneJob) -> FinetuneJob:
    """The job with its checkpoints where all nodes reach them."""
    if job.remote is None or job.train.checkpoint_url is not None:
        return job
    url = f"{job.remote.store}/{Path(job.remote.order).parent.as_posix()}/checkpoints"
    return job.model_copy(update={"train": job.train.model_copy(update={"checkpoint_url": url})})


def begin(job: FinetuneJob) -> dict[str, Any]:
    """What the workers are told of their job; what workers of an attempt before said is gone."""
    checkpoints = checkpoints_folder(job.output_dir)
    for name in (FAILURE_NAME, STOP_NAME):
        (checkpoints / name).unlink(missing_ok=True)
    if job.remote is None:
        return {"job": job.model_dump_json()}
    mark = uuid.uuid4().hex
    write_text_atomic(checkpoints / MARK_NAME, mark)
    return {"remote": job.remote.model_dump(), "mark": mark}


def work(config: dict[str, Any], rank: int, run: Callable[[FinetuneJob], None]) -> None:
    """Runs a worker's job with the paths of its own node. A known error is left for the driver: raised, it would only be tried again."""
    if "remote" not in config:
        _run_here(FinetuneJob.model_validate_json(config["job"]), run)
        return
    remote, home = Remote.model_validate(config["remote"]), load_settings().home
    store = open_store(remote.store)
    order = orders.read(store, remote.order, Order)
    if order is None:
        raise ArtifactError(f"{remote.store}/{remote.order}: the order is gone. Run the driver's command again.")
    job = settled(FinetuneJob.model_validate({**orders.unpacked(order.job, home), "remote": config["remote"]}))
    mark_file = checkpoints_folder(job.output_dir) / MARK_NAME
    if mark_file.is_file() and mark_file.read_text(encoding="utf-8") == config["mark"]:
        _run_here(job, run)
        return
    try:
        orders.arrive(store, order, home)
        _run_away(job, store, home, rank, run)
    except SlipwayError as error:
        orders.write(store, beside(remote.order, "failure.json"), _known(error))


def stop_workers(job: FinetuneJob) -> None:
    """Asks all workers to stop after the step that runs."""
    (checkpoints_folder(job.output_dir) / STOP_NAME).touch()
    if job.remote is not None:
        open_store(job.remote.store).place.write(beside(job.remote.order, "stop"), b"")


def failure(job: FinetuneJob) -> SlipwayError | None:
    """The known error that a worker ended by, wherever it was."""
    content: bytes | None = None
    file = checkpoints_folder(job.output_dir) / FAILURE_NAME
    if file.is_file():
        content = file.read_bytes()
    elif job.remote is not None:
        content = open_store(job.remote.store).place.read(beside(job.remote.order, "failure.json"))
    return KnownError.model_validate_json(content).as_error() if content else None


def bring(job: FinetuneJob) -> None:
    """Fetches what a rank 0 on another node made, if it was on another."""
    if job.remote is None:
        return
    store, home = open_store(job.remote.store), load_settings().home
    found = orders.read(store, beside(job.remote.order, "worker.json"), Result)
    for path, sha256 in found.files.items() if found else ():
        store.fetch_file(sha256, orders.inside(home, path))


def _run_here(job: FinetuneJob, run: Callable[[FinetuneJob], None]) -> None:
    try:
        run(job)
    except SlipwayError as error:
        write_json_atomic(checkpoints_folder(job.output_dir) / FAILURE_NAME, _known(error).model_dump())


def _run_away(job: FinetuneJob, store: ArtifactStore, home: Path, rank: int, run: Callable[[FinetuneJob], None]) -> None:
    """On a node without the program's folders; rank 0 tells its progress, and in the end sends what it made."""
    assert job.remote is not None
    name, stop_file = job.remote.order, checkpoints_folder(job.output_dir) / STOP_NAME
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    stop_file.unlink(missing_ok=True)  # of an attempt before; where it is said again, the store has the word
    if rank != 0:
        run(job)
        return
    fresh_folder(job.output_dir)
    with mirrored(store, (job.progress_file, beside(name, "progress.jsonl")), (stop_file, beside(name, "stop"))):
        run(job)
    files = orders.pushed_files(store, home, job.output_dir, job.tracking.unsent_file if job.tracking else None)
    orders.write(store, beside(name, "worker.json"), Result(exit_code=0, files=files))
    shutil.rmtree(job.output_dir)


def _known(error: SlipwayError) -> KnownError:
    return KnownError(type=type(error).__name__, message=error.message)
