"""A Ray cluster of several `ray start` on loopback with the gateways in front of it, told what the chart helm/serving renders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from infra.network import free_port
from infra.settings import child_environment
from pipelines.charts import render

HEAD_IP = "127.0.0.1"
GATEWAY_IP = "127.0.0.2"
TOKEN = "0123456789abcdef" * 4
RAY_TOKEN = "fedcba9876543210" * 4
RAY_ACCESS = {"Authorization": f"Bearer {RAY_TOKEN}"}
OBJECT_STORE_BYTES = 80_000_000


def wait_until(is_true: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Returns once it is; what cannot be asked yet is not."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError, OSError):
            if is_true():
                return
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def manifest(manifests: list[dict[str, Any]], kind: str, component: str) -> dict[str, Any]:
    """The one of that kind and component."""
    found = [each for each in manifests if each["kind"] == kind]
    (only,) = [each for each in found if each["metadata"]["labels"]["app.kubernetes.io/component"] == component]
    return only


@dataclass
class Node:
    """One node of Ray, with a home of its own."""

    ip: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def family(self, word: str) -> list[psutil.Process]:
        """Its processes by a word of their command."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [each for each in psutil.Process(self.process.pid).children(recursive=True) if word in _command(each)]
        return []

    def kill(self) -> None:
        """Ends it as a lost machine does: everything at once, without a word."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait(30)

    def drain(self, timeout_s: float) -> subprocess.Popen[bytes]:
        """What the pod's `preStop` runs."""
        command = [sys.executable, "-m", "serving.node", "--timeout-s", str(timeout_s)]
        return subprocess.Popen(command, env=self.environment)


@dataclass
class Gateway:
    """One `python -m serving.gateway`."""

    url: str
    process: subprocess.Popen[bytes]

    def counted(self) -> set[str]:
        """The replicas that it tells Prometheus of."""
        text = httpx.get(f"{self.url}/metrics", params={"of": "counted"}).text
        lines = [line for line in text.splitlines() if line.startswith("slipway_engine_up{")]
        return {line.split('replica="')[1].split('"')[0] for line in lines}

    def replicas(self) -> set[str]:
        """The replicas that it knows."""
        lines = [
            line for line in httpx.get(f"{self.url}/metrics").text.splitlines() if line.startswith("slipway_front_requests_in_flight{")
        ]
        return {line.split('replica="')[1].split('"')[0] for line in lines}


@dataclass
class ServingCluster:
    """Head, workers and gateways; `values` are those of the chart."""

    values: dict[str, Any]
    num_workers: int = 2
    num_gateways: int = 2
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp")))  # sockets have short paths
    nodes: list[Node] = field(default_factory=list)
    num_started: int = 0
    gateways: list[Gateway] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.render(self.values)
        self.dashboard = f"http://{HEAD_IP}:{free_port()}"
        self.gcs = f"{HEAD_IP}:{free_port()}"
        self.serve_port = free_port()
        self.announce_ports = [free_port() for _ in range(self.num_gateways)]
        (self.folder / "token").write_text(TOKEN + "\n")

    @property
    def service(self) -> dict[str, Any]:
        """The RayService's spec."""
        return dict(manifest(self.manifests, "RayService", "model")["spec"])

    def render(self, values: dict[str, Any]) -> None:
        """What is told from now on."""
        self.manifests = render("serving", values, name="toy")

    def start(self) -> None:
        """Starts all of it; returns when every gateway is ready."""
        self.gateways = [self.start_gateway(number) for number in range(self.num_gateways)]
        self.nodes.append(self.add_node(is_head=True))
        for _ in range(self.num_workers):
            self.nodes.append(self.add_node(is_head=False))
        self.deploy(self.service["serveConfigV2"])
        for gateway in self.gateways:
            wait_until(lambda url=gateway.url: httpx.get(f"{url}/health").status_code == 200, 240, f"a gateway is ready: {self.status()}")

    def start_gateway(self, number: int) -> Gateway:
        """A gateway with the config of the chart's ConfigMap, at ports of its own: its pods would have addresses of their own."""
        config = self.folder / "config.yaml"
        config.write_text(manifest(self.manifests, "ConfigMap", "gateway")["data"]["config.yaml"])
        port, announce_port = free_port(), self.announce_ports[number]
        changes = [f"serve.host={GATEWAY_IP}", f"serve.port={port}", f"announce_port={announce_port}"]
        command = [
            sys.executable,
            "-m",
            "serving.gateway",
            "--config",
            str(config),
            *[part for each in changes for part in ("--set", each)],
        ]
        with (self.folder / f"gateway{number}.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment(f"gateway{number}"), stderr=log)
        return Gateway(f"http://{GATEWAY_IP}:{port}", process)

    def restart_gateway(self, number: int) -> Gateway:
        """Another one in the place of one that has ended; returns when it is ready."""
        started = self.start_gateway(number)
        wait_until(lambda: httpx.get(f"{started.url}/health").status_code == 200, 60, "another gateway")
        return started

    def add_node(self, is_head: bool) -> Node:
        """A node as KubeRay starts it in a pod: what the chart says of its group, and what must differ on one machine."""
        self.num_started += 1
        number = self.num_started
        group = self.service["rayClusterConfig"]["headGroupSpec" if is_head else "workerGroupSpecs"]
        resources = {} if is_head else dict(group[0]["resources"])
        own = {"num-cpus": "0"} if is_head else {"num-cpus": resources.pop("CPU"), "num-gpus": resources.pop("GPU")}
        own |= {"resources": json.dumps({name: int(amount) for name, amount in resources.items()})} if resources else {}
        ip = f"{HEAD_IP[:-1]}{number + 10}" if not is_head else HEAD_IP
        place = ["--head", f"--port={self.gcs.split(':')[1]}", "--include-dashboard=true"] if is_head else [f"--address={self.gcs}"]
        place += [f"--dashboard-host={HEAD_IP}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"] if is_head else []
        place += [f"--temp-dir={self.folder / 'ray'}"] if is_head else []
        place += [f"--node-ip-address={ip}", f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
        place += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--block", "--disable-usage-stats"]
        environment = self.environment(f"node{number}")
        command = [str(Path(sys.executable).with_name("ray")), "start", *place, *[f"--{name}={value}" for name, value in own.items()]]
        with (self.folder / f"node{number}.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if is_head:
            wait_until(lambda: httpx.get(f"{self.dashboard}/api/gcs_healthz").status_code == 200, 180, "Ray's head is up")
        else:
            wait_until(lambda: process.poll() is not None or ip in self.living_ips(), 180, "a worker has joined")
        if process.poll() is not None:  # Ray gives a node up that is not up within 30 s; a pod would start again too
            return self.add_node(is_head)
        return Node(ip, Path(environment["SLIPWAY_HOME"]), environment, process)

    def living_ips(self) -> set[str]:
        """Addresses of the nodes that Ray counts."""
        found = httpx.get(f"{self.dashboard}/nodes", params={"view": "summary"}, headers=RAY_ACCESS, timeout=30).json()["data"]["summary"]
        return {node["raylet"]["nodeManagerAddress"] for node in found if node["raylet"]["state"] == "ALIVE"}

    def deploy(self, serve_config: str) -> None:
        """What KubeRay does with serveConfigV2; only the port of Ray Serve's proxy is another."""
        config = yaml.safe_load(serve_config)
        config["http_options"] |= {"host": HEAD_IP, "port": self.serve_port}

        def put() -> bool:
            return httpx.put(f"{self.dashboard}/api/serve/applications/", json=config, headers=RAY_ACCESS, timeout=60).is_success

        wait_until(put, 180, "Ray Serve takes the applications")  # it is tried again, as KubeRay does

    def status(self) -> str:
        """What Ray Serve says of the applications."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            applications = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=RAY_ACCESS, timeout=30).json()["applications"]
            return json.dumps({name: (each["status"], each["message"]) for name, each in applications.items()})
        return "Ray's dashboard does not answer"

    def environment(self, name: str) -> dict[str, str]:
        """The variables of one pod."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        own = {
            "SLIPWAY_HOME": str(home),
            "SLIPWAY_GATEWAYS": ",".join(f"{GATEWAY_IP}:{port}" for port in self.announce_ports),
            "SLIPWAY_FRONT_TOKEN_FILE": str(self.folder / "token"),
            "SLIPWAY_WAKE_URL": f"http://{HEAD_IP}:{self.serve_port}",
            "RAY_AUTH_MODE": "token",  # as KubeRay sets them where the chart has `rayToken`
            "RAY_AUTH_TOKEN": RAY_TOKEN,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        }
        unwanted = {"RAY_ADDRESS", "SLIPWAY_HOME"}
        return {key: value for key, value in child_environment("serving").items() if key not in unwanted} | own | self.variables

    def stop(self) -> None:
        """Ends everything; the folder stays where something failed."""
        for gateway in self.gateways:
            gateway.process.send_signal(signal.SIGKILL)
            gateway.process.wait(10)
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
