"""What runs inside each Ray Train worker: load, resume, train, write the adapter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
import torch

from infra.errors import TransientError
from infra.files import sha256_json
from training.checkpoint import CheckpointStore
from training.config import FinetuneJob
from training.data.tokens import TokenRow, read_token_rows
from training.elsewhere import STOP_NAME, work
from training.folders import checkpoints_folder
from training.layout import Layout
from training.loop import Trainer
from training.model import prepare_model
from training.precision import compute_dtype, precision_name
from training.recorder import Recorder
from training.result import write_result


def train_on_worker(config: dict[str, Any]) -> None:
    """Reads what the driver gave and trains, on whichever node."""
    context = ray.train.get_context()
    torch.set_num_threads(config["cpus"])  # Ray sets OMP_NUM_THREADS to 1 for its workers
    work(config, context.get_world_rank(), lambda job: run_worker(job, config["parents"], context.get_world_size()))


def run_worker(job: FinetuneJob, parents: Sequence[str], num_workers: int = 1) -> None:
    """Trains to the end from the newest checkpoint, or from the start; rank 0 writes checkpoints, figures and the adapter."""
    started = time.perf_counter()
    dtype = compute_dtype(job.train.precision)
    layout = Layout(job.train.parallel, num_workers, worker_device())
    trainer = Trainer(prepare_model(job.base_dir, job.train, dtype), job.train, read_token_rows(job.tokens_dir, "train"), layout)
    recorder = Recorder(job, trainer)
    store = open_store(job, parents, trainer, precision_name(dtype))
    if state := store.load_latest():
        trainer.restore(state)
    recorder.begin(state.facts["history"] if state else None)
    train_to_end(trainer, recorder, job, store)
    write_result(trainer, job)
    if job.train.checkpoint_url:
        store.clear()
    recorder.finish(time.perf_counter() - started)


def worker_device() -> torch.device:
    """The GPU that Ray gave this worker, else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device(ray.train.torch.get_device())
    torch.cuda.set_device(device)
    return device


def open_store(job: FinetuneJob, parents: Sequence[str], trainer: Trainer, precision: str) -> CheckpointStore:
    """This run's checkpoints."""
    fingerprint, url = run_fingerprint(job, parents, precision), job.train.checkpoint_url
    place = f"{url.rstrip('/')}/{fingerprint[:16]}" if url else str(checkpoints_folder(job.output_dir))  # runs may share a URL
    return CheckpointStore(place, fingerprint, job.train.keep_checkpoints, trainer.layout, trainer.trained)


def train_to_end(trainer: Trainer, recorder: Recorder, job: FinetuneJob, store: CheckpointStore) -> None:
    """Every step that is left, with held-out loss and checkpoints at their steps; the last step always has a held-out loss.

    With `early_stop_evals` it may end before; with that or `keep_best` the trainer is left with the weights of the lowest held-out loss.
    With `keep_best` the step of that loss has a checkpoint of its own, which stays.

    Raises:
        TransientError: the driver asked to stop; a checkpoint of this step was written first.
    """
    heldout = spread(read_token_rows(job.tokens_dir, "heldout"), job.train.eval_rows)
    patience, remembers = job.train.early_stop_evals, job.train.keep_best or bool(job.train.early_stop_evals)
    stop_file = checkpoints_folder(job.output_dir) / STOP_NAME
    while trainer.step < trainer.total_steps and not (patience and recorder.evals_since_lowest >= patience):
        report = trainer.train_step()
        recorder.step(report)
        is_last, is_due = report.step == trainer.total_steps, report.step % job.train.checkpoint_steps == 0
        if heldout and (is_last or report.step % job.train.eval_steps == 0):
            recorder.heldout(report.step, trainer.evaluate(heldout))
            if remembers and recorder.evals_since_lowest == 0:
                trainer.remember()
                is_due |= job.train.keep_best
        must_stop = trainer.layout.any(stop_file.exists()) and not is_last
        if must_stop or (is_due and not is_last):
            store.save(replace(trainer.state(recorder.history), best_step=recorder.best_step if job.train.keep_best else None))
        if must_stop:
            store.finish()
            raise TransientError(f"stopped after step {report.step} of {report.total_steps} with a checkpoint; run again to go on from it.")
    store.finish()
    trainer.recall()


def run_fingerprint(job: FinetuneJob, parents: Sequence[str], precision: str) -> str:
    """Names everything that a checkpoint depends on, and not where or on how many workers the run goes on."""
    elsewhere = {"num_workers", "parallel", "cpus_per_worker", "micro_batch_rows", "gradient_checkpointing", "max_failures"}
    watching = {"keep_checkpoints", "checkpoint_steps", "checkpoint_url", "log_steps", "eval_steps", "eval_rows", "sample_rows"}
    settings = job.train.model_dump(mode="json", exclude=elsewhere | watching)
    return sha256_json({**settings, "precision": precision, "parents": list(parents)})


def spread(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """At most `count` rows, evenly over all of them."""
    return [rows[index * len(rows) // count] for index in range(min(count, len(rows)))] if len(rows) > count else list(rows)
