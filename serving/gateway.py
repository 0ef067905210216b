"""What clients of a cluster connect to: `python -m serving.gateway --config F`, two or more of it, in front of the same replicas.

- Each is whole by itself: replicas announce themselves to every one, so any may go at any moment.
- Told to stop, it first says so at `/health` and goes on answering until load balancers have noticed, then finishes what runs, then ends.
"""

from __future__ import annotations

import signal
import threading
import time

from infra.process import run_program
from infra.settings import ClusterAddresses, load_cluster_addresses
from serving.bell import HttpBell
from serving.cluster_config import ClusterConfig
from serving.front.server import FrontServer


def run(config: ClusterConfig) -> None:
    """Answers until told to stop. Raises ConfigError where it cannot listen, or where the environment lacks what it needs."""
    is_told = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: is_told.set())
    addresses = load_cluster_addresses()
    limits = config.front_limits
    front = FrontServer(
        limits, limits.host, bell(config, addresses), config.model_name, config.announce_port, addresses.front_token.get_secret_value()
    )
    front.start()
    is_told.wait()
    front.leave()
    time.sleep(config.leave_s)
    front.drain(limits.drain_timeout_s)
    front.stop()


def bell(config: ClusterConfig, addresses: ClusterAddresses) -> HttpBell:
    """What rings for a model that sleeps; it is silent where none does, or where Ray Serve's address is not known."""
    pool = config.first_awake
    url = None if pool is None or addresses.wake_url is None else addresses.wake_url.rstrip("/") + config.wake_path(pool)
    return HttpBell(url, addresses.front_token.get_secret_value())


if __name__ == "__main__":
    run_program(ClusterConfig, run)
