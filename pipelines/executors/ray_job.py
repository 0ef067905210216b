"""Runs a step's program as a job of a Ray cluster; artifacts travel by the store.

The job's name follows from the step's slot, and Ray takes a name once: a driver that died and starts again finds the job that runs and
follows it, and two drivers at once follow the same one. Where a job has ended and must be run again, the next takes the next number: Ray
keeps the name of one that has ended for longer than it keeps the job (the actor that watched over it, minutes).
"""

from __future__ import annotations

import itertools
import logging
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from infra.artifact_store import ArtifactStore
from infra.errors import SlipwayError, TransientError
from infra.mirror import SYNC_S
from infra.process import Job
from pipelines.executors.ray_jobs_api import RUNNING, RayJob, RayJobs, last_line
from pipelines.executors.shipping import Shipment

log = logging.getLogger(__name__)
TICK_S = 0.25
ASK_S = 0.5
LOG_S = 5.0
MAX_LOST = 2
STOP_WAIT_S = "25"  # seconds a job that is stopped has for its checkpoint before Ray kills it; Ray's default is 3
BRINGS_OWN_WORKERS = ("training.finetune",)  # asks Ray for what its workers need, and needs nothing for itself


class RayExecutor:
    """Programs as jobs of one Ray cluster."""

    def __init__(self, jobs: RayJobs, store: ArtifactStore, home: Path) -> None:
        self._jobs, self._store, self._home = jobs, store, home

    def run_to_end(self, module: str, job: Job, config_file: Path, log_file: Path, on_tick: Callable[[], None]) -> None:
        """Runs the program on the cluster, or follows the one that runs already; where its machine is lost, starts it again, twice.

        Raises what the program raised, and TransientError where the cluster is lost, or the job was stopped there. An interrupt leaves the
        job running.
        """
        shipment = Shipment(self._store, self._home, module, job)
        for num_lost in range(MAX_LOST + 1):
            if shipment.is_done():
                break
            name = self._start(shipment)
            try:
                ended = self._follow(shipment, name, log_file, on_tick)
            except KeyboardInterrupt:
                log.warning(
                    "%s goes on; the same command follows it. To stop it: ray job stop --address %s %s", name, self._jobs.address, name
                )
                raise
            if shipment.result() is not None or not is_lost(ended) or num_lost == MAX_LOST:
                self._raise_unexplained(shipment, ended, log_file)
                break
        shipment.collect()
        on_tick()

    def _start(self, shipment: Shipment) -> str:
        """Submits the job unless it runs; its name."""
        names = (shipment.name if number == 1 else f"{shipment.name}-{number}" for number in itertools.count(1))
        name, found = next((name, found) for name in names if (found := self._jobs.get(name)) is None or found.status in RUNNING)
        if found is not None and not shipment.has_order():
            raise TransientError(
                f"{name} runs at {self._jobs.address} with an order that is gone from the store. Stop it there: "
                f"ray job stop --address {self._jobs.address} {name}"
            )
        if found is None:
            shipment.send()
            num_cpus = 0.0 if shipment.module in BRINGS_OWN_WORKERS else 1.0
            self._jobs.submit(name, shlex.join(shipment.command), num_cpus, {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S})
        return name

    def _follow(self, shipment: Shipment, name: str, log_file: Path, on_tick: Callable[[], None]) -> RayJob:
        """What Ray says of the job once it has ended; its log and progress are brought here meanwhile."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        due_s = dict.fromkeys(("ask", "follow", "log"), 0.0)
        while True:
            now_s = time.monotonic()
            if now_s >= due_s["ask"]:
                due_s["ask"] = now_s + ASK_S
                found = self._jobs.get(name)
                if found is None:
                    found = RayJob(status="FAILED", message="the cluster has forgotten the job: its head was started anew")
                has_ended = found.status not in RUNNING
                if has_ended or now_s >= due_s["follow"]:
                    due_s["follow"] = now_s + SYNC_S
                    shipment.follow()
                if has_ended or now_s >= due_s["log"]:
                    due_s["log"] = now_s + LOG_S
                    self._copy_log(name, log_file)
                if has_ended:
                    return found
            on_tick()
            time.sleep(TICK_S)

    def _copy_log(self, name: str, log_file: Path) -> None:
        if text := self._jobs.log(name):
            log_file.write_text(text, encoding="utf-8")

    def _raise_unexplained(self, shipment: Shipment, ended: RayJob, log_file: Path) -> None:
        """Raises for an end of which the program itself left no word."""
        if shipment.result() is not None:
            return
        what = f"{shipment.module} ({shipment.name} at {self._jobs.address})"
        if ended.status == "STOPPED":
            raise TransientError(f"{what} was stopped there. Run the same command again to resume.")
        if is_lost(ended):
            raise TransientError(
                f"{what}: its machine was lost {MAX_LOST + 1} times ({last_line(ended.message or '')}). Run it again to resume."
            )
        if ended.status == "FAILED":
            raise SlipwayError(
                f"{what} ended with exit code {ended.driver_exit_code} before it could say why: {last_line(ended.message or '')}. "
                f"Its log is {log_file}; is this version of Slipway installed on the cluster's nodes?"
            )


def is_lost(job: RayJob) -> bool:
    """Whether the job failed with the machine that it ran on: its command did not end by itself."""
    return job.status == "FAILED" and job.driver_exit_code is None
