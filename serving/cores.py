"""Cores of this machine, shared among replicas."""

from __future__ import annotations

import os

from infra.errors import ConfigError
from serving.config import ServeConfig


def with_cores(config: ServeConfig) -> ServeConfig:
    """The config with the cores of one replica settled. Raises ConfigError when this machine has too few."""
    num_cores = os.cpu_count() or 1
    wanted = config.cpus_per_replica or max(1, num_cores // config.num_replicas)
    if wanted * config.num_replicas > num_cores:
        raise ConfigError(
            f"{config.num_replicas} replicas with {wanted} cores each need {wanted * config.num_replicas} cores; this machine has "
            f"{num_cores}. Lower serve.num_replicas or serve.cpus_per_replica."
        )
    return config.model_copy(update={"cpus_per_replica": wanted})
