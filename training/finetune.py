"""`python -m training.finetune --config F`: an adapter or a whole model, trained on one or more Ray Train workers.

Killed workers are replaced and go on from the last checkpoint; after the whole program was killed the same command does so too.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from infra.chat import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from infra.contracts import Manifest, ModelFacts, verify, write_manifest
from infra.errors import BY_NAME, ArtifactError, ConfigError, TransientError
from infra.files import read_json, require_free_space
from infra.process import run_program
from training.adapter import adapter_facts
from training.checkpoint import checkpoints_folder
from training.config import FinetuneJob
from training.folders import copy_texts, fresh_folder
from training.preflight import check_layout, count_trained

FAILURE_NAME = "failure.json"
STOP_NAME = "stop"
STOP_TIMEOUT_S = 10.0  # for the step that runs and its checkpoint, within what a pre-empted pod is given
OBJECT_STORE_BYTES = 128 << 20  # workers exchange gradients over gloo, not through the object store
RAY_ENVIRONMENT = {  # each of the first three is one more process that takes seconds to start; all are read by Ray when it is imported
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how long the end of training, or of a worker, can go unnoticed; 2 by default
}
BYTES_PER_PARAMETER = 4 * 4  # one checkpoint holds master weights, two moments and, with early stopping, the best weights, in fp32


def finetune(job: FinetuneJob) -> None:
    """Trains the adapter and writes it. Raises ConfigError or ArtifactError before anything starts where the inputs do not fit."""
    base, tokens = verify(job.base_dir, ("base",)), verify(job.tokens_dir, ("tokens",))
    if tokens.parents.get("base") != base.digest:
        raise ArtifactError(
            f"{job.tokens_dir}: made for the base model {tokens.parents.get('base')}, given is {base.digest}. Render the rows again."
        )
    num_parameters = count_trained(job)
    check_layout(job)
    checkpoints = checkpoints_folder(job.output_dir)
    num_checkpoints = job.train.keep_checkpoints + job.train.keep_best + 1  # the one being written too
    require_free_space(checkpoints, num_parameters * BYTES_PER_PARAMETER * num_checkpoints, "checkpoints")
    fresh_folder(job.output_dir)
    for name in (FAILURE_NAME, STOP_NAME):
        (checkpoints / name).unlink(missing_ok=True)
    train_on_ray(job, base, tokens)
    if (checkpoints / FAILURE_NAME).is_file():
        failure = read_json(checkpoints / FAILURE_NAME)
        raise BY_NAME.get(failure["type"], ConfigError)(failure["message"])
    is_full = job.train.method == "full"
    copy_texts(job.base_dir, job.output_dir, None if is_full else (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TEMPLATE_NAME))
    parents = {"base": base.digest, "tokens": tokens.digest}
    write_manifest(job.output_dir, "merged" if is_full else "adapter", job.provenance, model=trained_facts(job, base), parents=parents)
    shutil.rmtree(checkpoints, ignore_errors=True)


def train_on_ray(job: FinetuneJob, base: Manifest, tokens: Manifest) -> None:
    """Runs the worker group to its end on a Ray of this machine, which is shut down in every case.

    Raises:
        TransientError: workers were lost more often than `max_failures`; checkpoints stay.
    """
    _quieten()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus = cpus_per_worker(job)
    runs = checkpoints_folder(job.output_dir) / "ray"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local", num_cpus=cpus * job.train.num_workers, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, object_store_memory=OBJECT_STORE_BYTES,
    )  # fmt: skip
    use_gpu = ray.cluster_resources().get("GPU", 0) >= job.train.num_workers
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which ends the program at once
    try:
        resources = {"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job.model_dump_json(), "cpus": cpus, "parents": [base.digest, tokens.digest]},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=job.train.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=RunConfig(name="train", storage_path=str(runs), failure_config=FailureConfig(max_failures=job.train.max_failures)),
        )
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TransientError(
            f"training stopped: {error}. {job.train.max_failures} restarts were allowed; run again to go on from the last checkpoint."
        ) from error
    except KeyboardInterrupt:
        stop_workers(checkpoints_folder(job.output_dir))
        raise
    finally:
        ray.shutdown()


def stop_workers(checkpoints: Path) -> None:
    """After Ctrl-C or SIGTERM: lets the workers write a checkpoint before they go, for as long as may be waited."""
    (checkpoints / STOP_NAME).touch()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while not (checkpoints / FAILURE_NAME).is_file() and time.monotonic() < deadline_s:
        time.sleep(0.1)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's function; loads the trainer in the worker alone, since driver and controller would spend three seconds each on it."""
    from training.worker import train_on_worker

    train_on_worker(config)


def cpus_per_worker(job: FinetuneJob) -> int:
    """Cores of one worker: as configured, else this machine's shared among the workers."""
    import psutil

    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    return job.train.cpus_per_worker or max(1, cores // job.train.num_workers)


def trained_facts(job: FinetuneJob, base: Manifest) -> ModelFacts:
    """The base's facts with this adapter's, if one is trained."""
    assert base.model is not None
    adapter = None if job.train.method == "full" else adapter_facts(job.train.lora)
    return base.model.model_copy(update={"base_digest": base.digest, "adapter": adapter})


def _quieten() -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    run_program(FinetuneJob, finetune)
