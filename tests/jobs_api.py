"""Ray's Jobs API on loopback, as far as a driver uses it, running each job as a process of this machine: answers as Ray 2.60 gives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from infra.child import REPOSITORY


@dataclass
class StartedJob:
    """One job."""

    process: subprocess.Popen[bytes]
    log_file: Path
    was_stopped: bool = False
    was_lost: bool = False

    def details(self) -> dict[str, Any]:
        """What Ray says of it."""
        code = self.process.poll()
        if code is None:
            return {"status": "RUNNING", "message": "Job is currently running.", "driver_exit_code": None, "type": "SUBMISSION"}
        if self.was_lost:
            return {"status": "FAILED", "message": "Unexpected error occurred: The actor died.", "driver_exit_code": None}
        if self.was_stopped:
            return {"status": "STOPPED", "message": "Job was intentionally stopped.", "driver_exit_code": code}
        status = "SUCCEEDED" if code == 0 else "FAILED"
        return {"status": status, "message": f"Job entrypoint command failed with exit code {code}", "driver_exit_code": code}


@dataclass
class JobsApi:
    """The server's jobs by their submission ids, and all that were ever started."""

    folder: Path
    home: Path
    jobs: dict[str, StartedJob] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    address: str = ""
    token: str = ""

    def submit(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Starts a job."""
        name = body["submission_id"]
        if name in self.jobs:
            return 400, f"Traceback\nValueError: Job with submission_id {name} already exists. Please use a different submission_id."
        environment = {**os.environ, **body["runtime_env"]["env_vars"], "SLIPWAY_HOME": str(self.home)}
        environment |= {"OMP_NUM_THREADS": "1", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}  # as Ray gives an entrypoint
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder / "programs"), str(REPOSITORY)])
        log_file = self.folder / f"{name}-{len(self.started)}.log"
        self.started.append(name)
        with log_file.open("wb") as log:
            command, quiet = body["entrypoint"], {"stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, shell=True, env=environment, start_new_session=True, cwd=self.folder, **quiet)
        self.jobs[name] = StartedJob(process, log_file)
        return 200, {"job_id": name, "submission_id": name}

    def kill(self, name: str) -> None:
        """The job's machine is lost."""
        job = self.jobs[name]
        job.was_lost = True
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()

    def stop(self, name: str) -> None:
        """As `ray job stop`."""
        job = self.jobs[name]
        job.was_stopped = True
        os.killpg(job.process.pid, signal.SIGTERM)

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """Status and answer to one request."""
        name, _, what = path.removeprefix("/api/jobs/").partition("/")
        if method == "POST" and not name:
            return self.submit(body or {})
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        if what == "logs":
            return 200, {"logs": self.jobs[name].log_file.read_text()}
        if what == "stop":
            self.stop(name)
            return 200, {"stopped": True}
        return 200, self.jobs[name].details()


@contextmanager
def jobs_api(folder: Path) -> Iterator[JobsApi]:
    """Serves while the block runs; no job outlives it."""
    folder.mkdir(parents=True, exist_ok=True)
    api, one_at_a_time = JobsApi(folder, folder / "node/home"), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if api.token and self.headers.get("Authorization") != f"Bearer {api.token}":
                status, answer = 401, "Unauthorized"
            else:
                with one_at_a_time:  # as Ray takes a name once
                    status, answer = api.answer(self.command, self.path, json.loads(content) if content else None)
            text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _do

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for job in api.jobs.values():
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
