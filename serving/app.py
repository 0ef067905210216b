"""Serves one model folder until told to stop: checks first, then a local Ray, then one Ray Serve application.

- Everything that can be wrong with the input is found before Ray starts.
- However it ends (SIGTERM, Ctrl-C, an error, even during start-up), no process of the session is left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import api_keys
from infra.errors import ArtifactError, TransientError
from infra.files import write_json_atomic
from infra.local_ray import start_ray
from infra.network import SERVE_PORT_OPTION, require_free_port
from infra.process import run_program
from serving.adapters import require_adapters, with_absolute_adapters
from serving.config import DEPLOYMENT_NAME, ServeConfig, ServeJob
from serving.cores import num_needed, require_gpus, with_cores
from serving.engines.registry import verify_model
from serving.front.server import FrontServer
from serving.interpreter import engine_python
from serving.process_tree import adopt_orphans, end_children
from serving.trust import require_all_trusted, settled_trust
from serving.wake import Waker

READY_NAME = "serving.json"
REPLICA_HOST = "127.0.0.1"  # the local Ray has no other machine
RAY_ENVIRONMENT = {
    "RAY_preload_python_modules": "serving.deployment",  # the processes that Ray keeps ready need not load it when a replica is asked for
    # Of 0.1: its look at what should be and what is took 5% of a core with Ray's own book-keeping, that engine and clients lack; now 3%. A
    # server was up as soon, 11.2 to 12.3 s by 0.1 and 11.4 to 11.7 by 0.25.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
LOOK_S = 3.0  # one look at the application's status costs the driver 0.2 s of computing, so it is asked for rarely
OBJECT_STORE_BYTES = 80_000_000  # Ray's smallest is 75 MB; requests and tokens never pass through the object store


def run(job: ServeJob) -> None:
    """Serves `job.model_dir`; writes `serving.json` into `job.output_dir` once requests are answered.

    Raises ArtifactError and ConfigError (a port in use, too few cores, no Python with the engine, no file of API keys, an adapter of
    another base, a model that nobody trusted has signed) before Ray starts, TransientError when start-up takes too long.
    """
    started_s = time.time()
    job = job.model_copy(update={"serve": settled_trust(job.serve)})
    for each in job.per_pool:
        require_adapters(each.serve, each.model_dir, verify_model(each.model_dir, each.serve))
        require_all_trusted(each.model_dir, each.model_name, each.serve)
    require_free_port(job.serve.host, job.serve.port, SERVE_PORT_OPTION)
    job = _with_keys(job)
    job = job.model_copy(update={"serve": with_absolute_adapters(job.serve)})
    configs = with_cores([each.serve for each in job.per_pool])
    jobs = [_with_python(each.model_copy(update={"serve": config})) for each, config in zip(job.per_pool, configs, strict=True)]
    ready_file = job.output_dir / READY_NAME
    ready_file.unlink(missing_ok=True)
    adopt_orphans()
    waker = Waker()
    front = FrontServer(job.serve, REPLICA_HOST, waker, job.model_name)
    is_ready = False
    try:
        _start(jobs, front)
        waker.start(DEPLOYMENT_NAME, cheapest(jobs).application_name)
        _write_ready(ready_file, job, started_s)
        is_ready = True
        _wait_for_ever()
    except (KeyboardInterrupt, SystemExit) as signalled:  # SystemExit comes from the handler that Ray sets while it starts
        if not is_ready:
            raise KeyboardInterrupt from signalled
    finally:
        ready_file.unlink(missing_ok=True)
        _stop(front, job.serve.drain_timeout_s if is_ready else 0.0)


def cheapest(jobs: Sequence[ServeJob]) -> ServeJob:
    """The pool that is woken first."""
    return min(jobs, key=lambda job: job.pool.usd_per_hour if job.pool else 0.0)


def _with_keys(job: ServeJob) -> ServeJob:
    """The job with an absolute path to the API keys, if any are wanted. Raises ConfigError when they cannot be read."""
    path = job.serve.api_keys_file
    if path is None:
        return job
    api_keys.read(path)
    return job.model_copy(update={"serve": job.serve.model_copy(update={"api_keys_file": path.absolute()})})


def _with_python(job: ServeJob) -> ServeJob:
    """The job with the engine's Python settled, by absolute path. Raises ConfigError where none has the engine."""
    return job.model_copy(update={"serve": job.serve.model_copy(update={"engine_python": engine_python(job.serve)})})


def _start(jobs: Sequence[ServeJob], front: FrontServer) -> None:
    """Starts front, Ray and an application a pool; waits until a replica is there. Raises ConfigError, ArtifactError, TransientError."""
    address = front.start()
    os.environ.update(RAY_ENVIRONMENT)
    import ray

    deadline_s = time.monotonic() + jobs[0].serve.start_timeout_s
    start_ray(num_needed([job.serve for job in jobs]), OBJECT_STORE_BYTES)
    require_gpus([job.serve for job in jobs], num_found=int(ray.cluster_resources().get("GPU", 0)))
    from ray import serve

    from serving.deployment import build_app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    targets = [serve.RunTarget(build_app(job, address), name=job.application_name, route_prefix=None) for job in jobs]
    serve.run_many(targets, wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
    _wait_for_replica(front, deadline_s)


def _wait_for_replica(front: FrontServer, deadline_s: float) -> None:
    """Returns once a replica is ready. Raises ArtifactError when the model cannot start, TransientError past `deadline_s`."""
    while not front.replicas.has_some.wait(LOOK_S):
        if time.monotonic() > deadline_s:
            raise TransientError("the model is not ready in time. Raise serve.start_timeout_s, or free some cores.")
        _require_no_failure()


def _require_no_failure() -> None:
    """Raises ArtifactError when Ray Serve has given the application up."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    for application in serve.status().applications.values():
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            reasons = "; ".join(deployment.message for deployment in application.deployments.values())
            raise ArtifactError(f"the model did not start: {reasons or application.message}")


def url(config: ServeConfig) -> str:
    """Where clients on this machine reach the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, f"[{config.host}]" if ":" in config.host else config.host)
    return f"http://{host}:{config.port}"


def _write_ready(ready_file: Path, job: ServeJob, started_s: float) -> None:
    ready: dict[str, Any] = {
        "url": url(job.serve),
        "model_name": job.model_name,
        "pid": os.getpid(),
        "started_s": round(time.time() - started_s, 3),
    }
    write_json_atomic(ready_file, ready)


def _wait_for_ever() -> None:
    while True:
        signal.pause()


def _stop(front: FrontServer, drain_timeout_s: float) -> None:
    """Drains and ends everything below this process; a second signal no longer interrupts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    front.drain(drain_timeout_s)
    with contextlib.suppress(Exception):  # a process edge: what cannot be stopped in order is ended below
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
    front.stop()
    end_children()


if __name__ == "__main__":
    run_program(ServeJob, run)
