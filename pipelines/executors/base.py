"""The seam between a step and where its program runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from infra.artifact_store import open_store
from infra.errors import ConfigError
from infra.process import Job
from infra.settings import Settings
from pipelines.executors import local
from pipelines.executors.ray_job import RayExecutor
from pipelines.executors.ray_jobs_api import RayJobs


class Executor(Protocol):
    """Runs programs; what they make is the same wherever they run."""

    def run_to_end(self, module: str, job: Job, config_file: Path, log_file: Path, on_tick: Callable[[], None]) -> None:
        """Runs `python -m module` on the job, or goes on with the one that an earlier driver started, to its end.

        Its output is in `job.output_dir` when this returns, its log in `log_file`; its progress is in `job.progress_file` as it comes, and
        `on_tick` is called several times a second. Raises the known error that the program left, SlipwayError with the end of its log
        where it left none, TransientError where the machine was lost.
        """


def make_executor(settings: Settings) -> Executor:
    """The executor that the settings name. Raises ConfigError where what it needs is not set."""
    if settings.executor == "local":
        return local.LocalExecutor()
    if problems := needs(settings):
        raise ConfigError("\n".join(problems))
    assert settings.store is not None
    store = open_store(settings.store)
    if settings.executor == "kubernetes":
        from pipelines.cluster.connect import connect  # half a second that no other run needs
        from pipelines.executors.kubernetes import KubernetesExecutor, read_values

        return KubernetesExecutor(connect(), store, settings.home, read_values(settings.kubernetes_values))
    return RayExecutor(RayJobs(settings.ray_jobs_address, settings.ray_token), store, settings.home)


def needs(settings: Settings) -> list[str]:
    """What an executor on other machines still needs, a line each."""
    if settings.executor == "local":
        return []
    problems = []
    if settings.store is None:
        problems.append(
            f"--executor {settings.executor}: programs run on other machines, and SLIPWAY_STORE names no place that both reach. "
            "Set it, for example to s3://bucket/slipway."
        )
    if settings.executor == "kubernetes":
        problems += _needs_of_kubernetes(settings)
    return problems


def _needs_of_kubernetes(settings: Settings) -> list[str]:
    """Helm, a cluster's address and values that can be read, as far as that can be told without asking the cluster."""
    from pipelines.charts import helm_program
    from pipelines.cluster.connect import connect
    from pipelines.executors.kubernetes import read_values

    problems = []
    for look in (helm_program, connect, lambda: read_values(settings.kubernetes_values)):
        try:
            look()  # type: ignore[operator]
        except ConfigError as error:
            problems.append(f"--executor kubernetes: {error.message}")
    return problems
