"""The servers that the benchmark asks: ours, and those of peers that are installed somewhere. Each lives for the length of a block."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.errors import TransientError
from infra.files import read_json, write_json_atomic
from infra.network import free_port
from infra.settings import child_environment
from serving.app import READY_NAME
from serving.config import ServeConfig, ServeJob

MODEL_NAME = "bench"
PEER_START_S = 400.0  # vLLM compiles for minutes where it has not been on this machine before
POLL_S = 0.05
LOOK_S = 5.0
ENGINE_WORDS = ("serving.engines.",)
LLAMA_CPP_SCRIPT = Path(__file__).parent / "peers" / "llama_cpp.py"


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    model_name: str
    process: psutil.Process

    @property
    def family(self) -> list[psutil.Process]:
        """Its processes now."""
        return [self.process, *self.process.children(recursive=True)]

    @property
    def cpu_s(self) -> tuple[float, float]:
        """Processor time so far of its engine, and of all else in it."""
        engine = other = 0.0
        for process in self.family:
            try:
                times = process.cpu_times()
                is_engine = any(word in " ".join(process.cmdline()) for word in ENGINE_WORDS)
            except psutil.NoSuchProcess:
                continue
            used_s = times.user + times.system
            engine, other = (engine + used_s, other) if is_engine else (engine, other + used_s)
        return engine, other

    @property
    def replica_start_s(self) -> float:
        """How long its replica took from being asked for to ready."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=LOOK_S) as response:
            lines = response.read().decode().splitlines()
        return max(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("slipway_replica_start_seconds{"))

    @property
    def rss_bytes(self) -> int:
        """Memory of all its processes, what they share counted in each."""
        return self._rss_bytes()

    @property
    def replica_rss_bytes(self) -> int:
        """Memory of one replica: its own process and its engine's."""
        return self._rss_bytes("ServeReplica", *ENGINE_WORDS)

    @property
    def engine_rss_bytes(self) -> int:
        """Memory of its engines' processes."""
        return self._rss_bytes(*ENGINE_WORDS)

    def _rss_bytes(self, *words: str) -> int:
        """Memory of the processes whose commands have one of these words in them; no words mean all."""
        size_bytes = 0
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not words or any(word in " ".join(process.cmdline()) for word in words):
                    size_bytes += process.memory_info().rss
        return size_bytes


@contextmanager
def our_server(model_dir: Path, limits: ServeConfig) -> Iterator[tuple[Server, float]]:
    """A real server of ours, and how long it took to start in seconds. Raises TransientError when it does not start."""
    limits = limits.model_copy(update={"allow_unsigned": (MODEL_NAME,)})  # whoever measures a folder has named it
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as folder:
        job = ServeJob(output_dir=Path(folder) / "server", model_dir=model_dir.absolute(), model_name=MODEL_NAME, serve=limits)
        config = Path(folder) / "serve.json"
        write_json_atomic(config, job.model_dump(mode="json"))
        with _program([sys.executable, "-m", "serving.app", "--config", str(config)]) as process:
            ready_file = job.output_dir / READY_NAME
            while not ready_file.is_file():
                _require_alive(process, "the server")
                time.sleep(POLL_S)
            ready = read_json(ready_file)
            yield Server(ready["url"], MODEL_NAME, psutil.Process(process.pid)), ready["started_s"]


@contextmanager
def peer_server(name: str, python: Path, model: Path, num_streams: int, num_threads: int) -> Iterator[Server]:
    """A peer's server on `model`: a GGUF file for llama.cpp, a model folder for vLLM. Raises TransientError."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _program(_peer_command(name, python, model, port, num_streams, num_threads)) as process:
        deadline_s = time.monotonic() + PEER_START_S
        while not _answers(f"{url}/health"):
            _require_alive(process, name)
            if time.monotonic() > deadline_s:
                raise TransientError(f"{name} did not start within {PEER_START_S:g} s. Try again on a quieter machine.")
            time.sleep(POLL_S)
        yield Server(url, MODEL_NAME, psutil.Process(process.pid))


def _peer_command(name: str, python: Path, model: Path, port: int, num_streams: int, num_threads: int) -> list[str]:
    if name == "llama.cpp":
        return [str(python), str(LLAMA_CPP_SCRIPT), *(str(each) for each in (model, port, num_streams, num_threads))]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", MODEL_NAME]
    command += ["--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", str(num_streams), "--dtype", "bfloat16"]
    # As large a cache as ours; without these it wants 0.92 of a machine's memory free, and does not start where less is.
    return [*command, "--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.5"]


@contextmanager
def _program(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=child_environment("serving"), stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _require_alive(process: subprocess.Popen[bytes], name: str) -> None:
    if process.poll() is not None:
        raise TransientError(f"{name} ended with exit code {process.returncode} before it was ready; its text is above.")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
