"""Real back ends for the tests: a PostgreSQL cluster, an S3 server, an MLflow server with accounts, and a proxy that cuts connections."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infra.network import free_port
from infra.settings import child_environment

S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
ACCOUNT, PASSWORD = "admin", "correct-horse-battery"


@contextmanager
def postgres() -> Iterator[str]:
    """A database cluster of its own with a database `mlflow`; gives its address. Runs as `postgres` where the tests run as root."""
    programs = next((path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True) if (path / "initdb").is_file()), None)
    if programs is None:
        pytest.skip("no PostgreSQL on this machine: `make services` installs it")
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="slipway-postgres-") as folder:  # pytest's own folders let only their owner through
        if user:
            shutil.chown(folder, user)

        def control(program: str, *arguments: str) -> None:
            command = [str(programs / program), *arguments]
            done = subprocess.run(command, cwd=folder, user=user, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        data = f"{folder}/data"
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        control("initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync")
        control("pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            control("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow")
            yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            control("pg_ctl", "-D", data, "-m", "fast", "-w", "stop")


@contextmanager
def s3(folder: Path, bucket: str = "models") -> Iterator[str]:
    """An S3 server with a bucket; gives its address."""
    port = free_port()
    with program(["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "s3.log"):
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/moto-api/data.json")
        import boto3

        keys = {name.lower(): value for name, value in S3_KEYS.items() if name != "AWS_DEFAULT_REGION"}
        with closing(boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)) as client:
            client.create_bucket(Bucket=bucket)
        yield url


@dataclass
class MlflowServer:
    """An MLflow server that can be stopped and started again on its port and its store."""

    folder: Path
    options: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            *self.options,
        ]
        environment = {**child_environment("mlflow"), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        wait_for(f"{self.url}/health", self.process)

    def stop(self) -> None:
        """Ends it and all that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it takes ten seconds to end in order
            self.process.wait(timeout=30)
            self.process = None


@contextmanager
def mlflow_server(folder: Path, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[MlflowServer]:
    """A running MLflow server."""
    server = MlflowServer(folder, options, environment or {})
    try:
        server.start()
        yield server
    finally:
        server.stop()


def with_accounts(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a server that asks for ACCOUNT and PASSWORD."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "accounts.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\nadmin_username = {ACCOUNT}\n"
        f"admin_password = {PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    return ["--app-name", "basic-auth"], {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests"}


@contextmanager
def program(arguments: Sequence[str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that runs as long as the block."""
    with log_file.open("ab") as log:
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(url: str, process: subprocess.Popen[bytes] | None = None, timeout_s: float = 90.0) -> None:
    """Returns when something answers there."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert process is None or process.poll() is None, f"it ended with {process.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


class Cutter:
    """A proxy in front of a server that cuts each of the first `num_cuts` connections that have sent `after_bytes`."""

    def __init__(self, port: int, after_bytes: int, num_cuts: int) -> None:
        self.target, self.after_bytes, self.cuts_left, self.num_cut = ("127.0.0.1", port), after_bytes, num_cuts, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            answers = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            answers.start()
            num_sent = 0
            with suppress(OSError):
                while data := client.recv(65536):
                    num_sent += len(data)
                    if num_sent > self.after_bytes and self._may_cut():
                        break
                    server.sendall(data)
            for each in (client, server):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            answers.join()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def _may_cut(self) -> bool:
        with self._lock:
            if self.cuts_left == 0:
                return False
            self.cuts_left -= 1
            self.num_cut += 1
            return True
