"""A Ray cluster of several `ray start` processes on loopback, each node with a SLIPWAY_HOME of its own, as machines have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.network import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120.0
TOKEN = "0123456789abcdef" * 4
STORE_BYTES = 80 << 20
# A lost node is noticed within two seconds, not in fifteen.
WATCHING = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@dataclass
class Node:
    """One `ray start`."""

    process: subprocess.Popen[bytes]
    home: Path

    def kill(self) -> None:
        """All its processes at once, as when a machine is lost."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            if process.is_running():
                process.kill()
        self.process.wait()


@dataclass
class RayNodes:
    """The cluster; its first node is the head, without cores to give out."""

    folder: Path
    variables: dict[str, str]
    ray_dir: Path
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def jobs_address(self) -> str:
        """Of Ray's Jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add(self, num_cpus: int) -> Node:
        """Starts one more node and waits until the cluster counts it."""
        number = len(self.nodes)
        home = self.folder / f"node-{number}/home"
        home.mkdir(parents=True)
        options = ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1"]
        options += ["--include-dashboard=true", f"--temp-dir={self.ray_dir}", f"--system-config={json.dumps(WATCHING)}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"]
        command += options if number == 0 else [f"--address=127.0.0.1:{self.port}"]
        command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={STORE_BYTES}", "--num-gpus=0"]
        ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        command += [f"--{name}-port={free_port()}" for name in ports]
        environment = {**os.environ, **self.variables, "SLIPWAY_HOME": str(home), **ACCESS}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder / "programs"), str(REPOSITORY)])
        for name in ("RAY_ADDRESS", "SLIPWAY_EXECUTOR"):
            environment.pop(name, None)
        with (home.parent / "ray.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=home)
        self.nodes.append(Node(process, home))
        self._wait(number + 1 - sum(node.process.poll() is not None for node in self.nodes))
        return self.nodes[-1]

    def _wait(self, num_alive: int) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.nodes[-1].process.poll() is None, (self.nodes[-1].home.parent / "ray.log").read_text()
            try:
                request = urllib.request.Request(f"{self.jobs_address}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"})
                with urllib.request.urlopen(request, timeout=5) as response:
                    found = json.load(response)["data"]["summary"]
                if sum(node["raylet"].get("state") == "ALIVE" for node in found) >= num_alive:
                    return
            except (OSError, KeyError, ValueError):
                pass
            assert time.monotonic() < deadline_s, "the Ray cluster did not start"
            time.sleep(0.3)


@contextmanager
def ray_nodes(folder: Path, num_cpus: tuple[int, ...], variables: dict[str, str] | None = None) -> Iterator[RayNodes]:
    """A head and one worker node for each number of cores; programs may be put into `folder/programs`."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # a socket's path has 107 bytes at most
        cluster = RayNodes(folder, variables or {}, Path(short))
        try:
            cluster.add(0)
            for each in num_cpus:
                cluster.add(each)
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                if node.process.poll() is None:
                    node.kill()
