"""A Ray of this machine for the length of a block, without its messages; Ray is imported only where a block begins."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import TransientError


@contextmanager
def local_ray(num_cpus: int, object_store_bytes: int) -> Iterator[None]:
    """Starts Ray with `num_cpus` cores to give out and stops it in the end; SIGTERM is handled as before. Raises TransientError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", module=r"ray\..*")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
            )  # fmt: skip
        except Exception as error:  # it raises nothing more special where its processes are not up after 30 s, or cannot start
            raise TransientError(
                f"Ray did not start here ({error}). Free some cores and memory, and run the same command again."
            ) from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which ends the program at once
        yield
    finally:
        ray.shutdown()
