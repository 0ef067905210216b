"""The Ray that training runs on: one of this machine for the length of a run, or the cluster that the user names, which stays."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigError, TransientError
from infra.local_ray import start_ray
from infra.network import require_listener
from infra.settings import TRAINING_ALLOCATOR, program_variables
from training.config import TrainConfig
from training.preload import NUM_OTHERS, keep_environments_alike, make_slots

OBJECT_STORE_BYTES = 128 << 20  # workers exchange gradients over gloo, not through the object store
RAY_ENVIRONMENT = {  # each of the first four is a process or more that takes seconds to start; all are read by Ray when it is imported
    "RAY_preload_python_modules": "training.preload",
    "RAY_worker_maximum_startup_concurrency": "16",  # no process waits for another one's start
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how long the end of training, or of a worker, can go unnoticed; 2 by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # then it counts again how many workers have room; 60 by default, after a lost node too
}


@dataclass(frozen=True)
class Place:
    """What each worker gets."""

    cpus: int
    """Threads it computes with."""
    use_gpu: bool
    is_own_ray: bool = False
    """Whether the Ray was started for this run, on this machine alone."""

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names. A Ray of our own starts as many processes ahead as it is told that it has cores, so a worker counts as one."""
        return {"CPU": 1.0 if self.is_own_ray else float(self.cpus)} | ({"GPU": 1.0} if self.use_gpu else {})


@contextmanager
def ray_session(train: TrainConfig, address: str | None) -> Iterator[Place]:
    """A Ray to train on: a new one of this machine, stopped at the end, or the one at `address`, which goes on. Within a session, the same.

    Raises:
        ConfigError: the address is neither `auto` nor host:port; Ray Client (ray://) shares no folder with the workers.
        TransientError: no Ray is at the address.
    """
    if address and address.startswith("ray://"):
        raise ConfigError(f"RAY_ADDRESS={address}: this is Ray Client. Start on a node of the cluster, with `auto` or its host:port.")
    _quieten()
    import ray

    if ray.is_initialized():
        yield _place(train, is_own_ray=not address)
        return
    slots = tempfile.TemporaryDirectory(prefix="slipway-")
    try:
        if address:
            _join(address)
        else:
            _start(train, Path(slots.name))
        yield _place(train, is_own_ray=not address)
    finally:
        ray.shutdown()
        slots.cleanup()


def cpus_per_worker(train: TrainConfig, node_cpus: Sequence[int]) -> int:
    """Cores of one worker: as configured, else the most with which all workers find room on these nodes, at least one."""
    fitting = (cpus for cpus in range(max(node_cpus, default=1), 0, -1) if sum(node // cpus for node in node_cpus) >= train.max_workers)
    return train.cpus_per_worker or next(fitting, 1)


def _start(train: TrainConfig, slots: Path) -> None:
    make_slots(slots, train.max_workers)
    loading = threading.Thread(target=importlib.import_module, args=("ray.train",))  # half a second that Ray's start leaves idle
    loading.start()
    start_ray(train.max_workers + NUM_OTHERS, OBJECT_STORE_BYTES)
    loading.join()
    keep_environments_alike()


def _join(address: str) -> None:
    if address != "auto":
        require_listener(address, "RAY_ADDRESS")  # Ray itself would try for ever
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    variables = {"env_vars": {**program_variables(), **TRAINING_ALLOCATOR}}  # the nodes were started without them
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=variables)
    except ConnectionError as error:
        raise TransientError(
            f"RAY_ADDRESS={address}: no Ray cluster is there ({error}). Start one, or unset RAY_ADDRESS for a Ray of this machine."
        ) from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which ends the program at once


def _place(train: TrainConfig, is_own_ray: bool) -> Place:
    import ray

    nodes = [_own_cores()] if is_own_ray else [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    has_gpus = bool(ray.cluster_resources().get("GPU", 0) >= train.min_workers)
    return Place(cpus_per_worker(train, nodes), has_gpus, is_own_ray)


def _own_cores() -> int:
    import psutil

    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def _quieten() -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
