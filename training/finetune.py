"""`python -m training.finetune --config F`: an adapter or a whole model, trained on one or more Ray Train workers.

Killed workers are replaced and go on from the last checkpoint; after the whole program was killed the same command does so too.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.chat import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from infra.contracts import Manifest, ModelFacts, verify, write_manifest
from infra.errors import ArtifactError, TransientError
from infra.files import require_free_space
from infra.process import run_program
from infra.settings import load_settings
from training import elsewhere
from training.adapter import adapter_facts
from training.cluster import Place, ray_session
from training.config import FinetuneJob
from training.folders import checkpoints_folder, copy_texts, fresh_folder
from training.preflight import check_layout, count_trained

STOP_TIMEOUT_S = 10.0  # for the step that runs and its checkpoint, within what a pre-empted pod is given
IDLE_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")
BYTES_PER_PARAMETER = 4 * 4  # one checkpoint holds master weights, two moments and, with early stopping, the best weights, in fp32


def finetune(job: FinetuneJob) -> None:
    """Trains the adapter and writes it. Raises ConfigError or ArtifactError before anything starts where the inputs do not fit."""
    job = elsewhere.settled(job)
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
    train_on_ray(job, base, tokens)
    if (known := elsewhere.failure(job)) is not None:
        raise known
    elsewhere.bring(job)
    is_full = job.train.method == "full"
    copy_texts(job.base_dir, job.output_dir, None if is_full else (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TEMPLATE_NAME))
    parents = {"base": base.digest, "tokens": tokens.digest}
    write_manifest(job.output_dir, "merged" if is_full else "adapter", job.provenance, model=trained_facts(job, base), parents=parents)
    shutil.rmtree(checkpoints, ignore_errors=True)


@contextlib.contextmanager
def started_ray(draft: FinetuneJob) -> Iterator[None]:
    """The Ray that the job will run on, started before the job is known whole."""
    with ray_session(draft.train, load_settings().ray_address):
        yield


def train_on_ray(job: FinetuneJob, base: Manifest, tokens: Manifest) -> None:
    """Runs the worker group to its end, on as many workers as there is room for.

    Raises:
        TransientError: workers were lost more often than `max_failures`; checkpoints stay.
    """
    runs = checkpoints_folder(job.output_dir) / "ray"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    with ray_session(job.train, load_settings().ray_address) as place:
        import ray.train

        trainer = make_trainer(job, place, runs, [base.digest, tokens.digest])
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TransientError(
                f"training stopped: {error}. {job.train.max_failures} restarts were allowed; run again to go on from the last checkpoint."
            ) from error
        except KeyboardInterrupt:
            stop_workers(job)
            raise


def make_trainer(job: FinetuneJob, place: Place, runs: Path, parents: list[str]) -> Any:
    """Ray Train's trainer; for a single worker one without a process group, whose driver and controller need not load torch."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    settings: dict[str, Any] = {
        "train_loop_config": {**elsewhere.begin(job), "cpus": place.cpus, "parents": parents},
        "scaling_config": ScalingConfig(num_workers=job.train.num_workers, use_gpu=place.use_gpu, resources_per_worker=place.resources),
        "run_config": RunConfig(name="train", storage_path=str(runs), failure_config=FailureConfig(max_failures=job.train.max_failures)),
    }
    if job.train.max_workers == 1:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return without_idle_actors(DataParallelTrainer, place.is_own_ray)(train_worker, **settings)
    from ray.train.torch import TorchConfig, TorchTrainer

    torch_config = TorchConfig(backend="nccl" if place.use_gpu else "gloo")
    return without_idle_actors(TorchTrainer, place.is_own_ray)(train_worker, torch_config=torch_config, **settings)


def without_idle_actors(trainer: Any, is_own_ray: bool) -> Any:
    """The class of trainer, less the actors that have nothing to do here and take more than a second each to start, one after the other.

    One hands out Ray Datasets, of which there are none; one frees what the workers held should the driver be killed, which Ray does too;
    one asks a cluster's autoscaler for nodes, which a Ray of our own does not have. There the controller also takes a process that is
    ready (`training/preload.py`).
    """

    class LeanTrainer(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in IDLE_CALLBACKS]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if not is_own_ray:
                return super()._initialize_and_run_controller(**parts)
            import ray
            from ray.train.v2._internal.execution.controller import TrainController

            for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
                getattr(parts["scaling_policy"], name)  # raises where Ray has renamed it
                setattr(parts["scaling_policy"], name, do_nothing)
            controller = ray.remote(num_cpus=0)(TrainController).remote(**parts)
            self._register_sigint_handler(controller)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return LeanTrainer


def do_nothing() -> None:
    """In place of a request to an autoscaler."""


def stop_workers(job: FinetuneJob) -> None:
    """After Ctrl-C or SIGTERM: lets the workers write a checkpoint before they go, for as long as may be waited."""
    elsewhere.stop_workers(job)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while elsewhere.failure(job) is None and time.monotonic() < deadline_s:
        time.sleep(0.1)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's function; loads the trainer in the worker alone, since driver and controller would spend three seconds each on it."""
    from training.preload import load_trainer

    load_trainer().train_on_worker(config)


def trained_facts(job: FinetuneJob, base: Manifest) -> ModelFacts:
    """The base's facts with this adapter's, if one is trained."""
    assert base.model is not None
    adapter = None if job.train.method == "full" else adapter_facts(job.train.lora)
    return base.model.model_copy(update={"base_digest": base.digest, "adapter": adapter})


if __name__ == "__main__":
    run_program(FinetuneJob, finetune, prepared=started_ray)
