"""Cores and GPUs of this machine, shared among replicas."""

from __future__ import annotations

import os
from collections.abc import Sequence

from infra.errors import ConfigError
from serving.config import ServeConfig


def with_cores(configs: Sequence[ServeConfig]) -> list[ServeConfig]:
    """The settings of all kinds of replicas with the cores of one replica settled. Raises ConfigError when this machine has too few."""
    num_cores = os.cpu_count() or 1
    shared = max(1, num_cores // sum(config.most_replicas for config in configs))
    settled = [config.model_copy(update={"cpus_per_replica": config.cpus_per_replica or shared}) for config in configs]
    if num_needed(settled) > num_cores:
        wanted = " and ".join(f"{config.most_replicas} replicas with {config.cpus_per_replica} cores each" for config in settled)
        raise ConfigError(
            f"{wanted} need {num_needed(settled)} cores; this machine has {num_cores}. "
            "Lower serve.num_replicas (with serve.autoscale its max_replicas) or serve.cpus_per_replica."
        )
    return settled


def num_needed(configs: Sequence[ServeConfig]) -> int:
    """Cores for all replicas that there can be."""
    return sum((config.cpus_per_replica or 1) * config.most_replicas for config in configs)


def require_gpus(configs: Sequence[ServeConfig], num_found: int) -> None:
    """Raises ConfigError where the replicas want more GPUs than Ray found here."""
    wanted = sum(config.gpus_per_replica * config.most_replicas for config in configs)
    if wanted > num_found:
        raise ConfigError(
            f"the replicas need {wanted} GPUs; Ray found {num_found} on this machine. Lower serve.num_replicas (with serve.autoscale its "
            "max_replicas) or serve.gpus_per_replica."
        )
