"""A Ray of this machine, without its messages and with only the processes that work here needs; Ray is imported only where one starts."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from infra.errors import TransientError


@contextmanager
def local_ray(num_cpus: int, object_store_bytes: int) -> Iterator[None]:
    """A Ray for the length of a block. Raises TransientError where it does not start."""
    try:
        start_ray(num_cpus, object_store_bytes)
        yield
    finally:
        import ray

        ray.shutdown()


def start_ray(num_cpus: int, object_store_bytes: int) -> None:
    """Starts Ray with `num_cpus` cores to give out; SIGTERM is handled as before. Raises TransientError where it does not start."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", module=r"ray\..*")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with few_processes():
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
            )  # fmt: skip
    except Exception as error:  # it raises nothing more special where its processes are not up after 30 s, or cannot start
        raise TransientError(f"Ray did not start here ({error}). Free some cores and memory, and run the same command again.") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which ends the program at once


@contextmanager
def few_processes() -> Iterator[None]:
    """Ray started inside is what a Ray without its dashboard's packages is (`pip install ray`), and less two processes that watch it.

    That is 2.0-3.1 s instead of 4.0-4.8 s on two cores. Left out, which no argument of `ray.init` does: the dashboard, which is started
    and waited for even with `include_dashboard=False`; its agent's HTTP server, whose fixed port a second Ray would wait for 3.4 s; the
    monitor of an autoscaling cluster and the one of worker logs.

    Raises AttributeError where a release of Ray has renamed what is replaced (2.60: _private/worker.py, node.py, services.py).
    """
    import ray._private.parameter
    import ray._private.services
    import ray._private.utils

    params = partial(ray._private.parameter.RayParams, no_monitor=True, include_log_monitor=False)
    replacements: list[tuple[Any, str, Any]] = [
        (ray._private.parameter, "RayParams", params),
        (ray._private.services, "start_api_server", _no_dashboard),
        (ray._private.utils, "get_dashboard_dependency_error", _not_wanted),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, replacement in replacements:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _no_dashboard(*_: Any, **__: Any) -> tuple[None, None]:
    """No address, no process."""
    return None, None


def _not_wanted() -> ImportError:
    """Why there is no dashboard."""
    return ImportError("no dashboard is wanted here")
