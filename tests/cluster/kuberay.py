"""Plays the KubeRay operator at the loopback API server: moves the status of RayJobs as KubeRay does, and runs their entry points here.

What it keeps to, of ray-operator/controllers/ray/rayjob_controller.go (KubeRay 1.7): the finalizer before anything else; Initializing with
the job's id and the cluster's name, then Running once there is a submitter; Suspending and Suspended by `spec.suspend`, from Initializing
and Running alone; Complete or Failed by the entry point's exit code, with Retrying in place of Failed while `failed` is not above
`backoffLimit`; and on deletion the job is stopped before the finalizer goes. Spec is never looked at again once a cluster is made.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra.errors import SlipwayError
from infra.settings import child_environment
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from tests.charts.crds import CRDS_VARIABLE, crds_folder, must_be_here, read_crds
from tests.cluster.server import Server

FINALIZER = "ray.io/rayjob-finalizer"
POLL_S = 0.05
RETRY_S = 1.0  # that a Ray cluster takes to go; a real one takes longer
REPOSITORY = Path(__file__).resolve().parents[2]


NEEDS_KUBERAY = pytest.mark.skipif(
    crds_folder() is None and not must_be_here(), reason=f"no KubeRay definitions: set {CRDS_VARIABLE} to a folder of them"
)


def ray_definitions() -> tuple[dict[str, Any], ...]:
    """The definitions of the ray.io kinds."""
    folder = crds_folder()
    assert folder, f"CI needs KubeRay's definitions: set {CRDS_VARIABLE} to a folder of them"
    return read_crds(folder)


@dataclass
class Started:
    """One run of an entry point, on a node of its own."""

    process: subprocess.Popen[str]
    home: Path
    pod: str
    order: str
    """Name of what it was told to do."""
    log: threading.Thread


@dataclass
class KubeRay:
    """The operator; `running` runs it for a block."""

    server: Server
    cluster: Cluster
    nodes_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every entry point, beside SLIPWAY_HOME."""
    hold: Callable[[dict[str, Any]], bool] = lambda live: False
    """Whether a RayJob is left alone for now: a test that wants to see a state sets it."""
    started: list[Started] = field(default_factory=list)
    """Every run of an entry point so far."""
    faults: list[BaseException] = field(default_factory=list)
    _now: dict[str, Started] = field(default_factory=dict)
    _retry_s: dict[str, float] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> KubeRay:
        self._thread = threading.Thread(target=self._work, name="kuberay", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for each in self.started:
            _kill(each)
        assert not self.faults, self.faults

    def _work(self) -> None:
        while not self._ended.wait(POLL_S):
            try:
                for live in self.cluster.find("ray.io/v1", "RayJob"):
                    if not self.hold(live):
                        self._reconcile(live)
            except SlipwayError:  # the object went, or the server was cut: the next look will do
                continue
            except BaseException as error:
                self.faults.append(error)
                raise

    def _reconcile(self, live: dict[str, Any]) -> None:
        ref = Ref("ray.io/v1", "RayJob", live["metadata"]["name"])
        status, spec = live.get("status") or {}, live["spec"]
        if live["metadata"].get("deletionTimestamp"):
            self._stop(ref)
            self._release(live, ref)
            return
        state = status.get("jobDeploymentStatus") or ""
        if state == "":
            self._begin(live, ref, status)
        elif state in ("Initializing", "Running") and spec.get("suspend"):
            self._set(ref, jobDeploymentStatus="Suspending")
        elif state == "Initializing":
            self._start(live, ref, status)
        elif state == "Running":
            self._look(live, ref, status)
        elif state == "Retrying" and ref.name in self._now:
            self._stop(ref)
            self._retry_s[ref.name] = time.monotonic() + RETRY_S
        elif state == "Retrying" and time.monotonic() < self._retry_s[ref.name]:
            return
        elif state in ("Suspending", "Retrying"):
            self._stop(ref)
            after = "Suspended" if state == "Suspending" else ""
            self._set(ref, jobDeploymentStatus=after, jobStatus="", jobId=None, rayClusterName=None, reason=None, message=None)
        elif state == "Suspended" and not spec.get("suspend"):
            self._set(ref, jobDeploymentStatus="", jobStatus="")

    def _begin(self, live: dict[str, Any], ref: Ref, status: Mapping[str, Any]) -> None:
        held = live["metadata"].get("finalizers") or []
        if FINALIZER not in held:
            self.cluster.merge(ref, {"metadata": {"finalizers": [*held, FINALIZER]}})
        name = f"{ref.name}-{uuid.uuid4().hex[:5]}"
        job_id = live["spec"].get("jobId") or name
        self._set(ref, jobDeploymentStatus="Initializing", jobId=job_id, rayClusterName=name, failed=status.get("failed", 0))

    def _start(self, live: dict[str, Any], ref: Ref, status: Mapping[str, Any]) -> None:
        template = live["spec"]["submitterPodTemplate"]
        pod = f"{ref.name}-{uuid.uuid4().hex[:5]}"
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": ref.name, "uid": live["metadata"]["uid"], "controller": True}
        metadata = {"name": pod, "labels": template["metadata"]["labels"], "ownerReferences": [owner]}
        self.cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
        container = template["spec"]["containers"][0]["name"]
        self._set_pod(pod, container, {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "Running")
        self._now[ref.name] = self._run(live["spec"]["entrypoint"], pod, container)
        self.started.append(self._now[ref.name])
        self._set(ref, jobDeploymentStatus="Running", jobStatus="RUNNING")

    def _run(self, entrypoint: str, pod: str, container: str) -> Started:
        home = self.nodes_dir / pod
        home.mkdir(parents=True)
        environment = {**child_environment(), **self.environment, "SLIPWAY_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [sys.executable, *shlex.split(entrypoint)[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

        def copy() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    self.server.write_log(self.cluster.namespace, pod, line, container)

        log = threading.Thread(target=copy, name=f"log-{pod}", daemon=True)
        log.start()
        words = shlex.split(entrypoint)
        return Started(process, home, pod, words[words.index("--job") + 1], log)

    def _look(self, live: dict[str, Any], ref: Ref, status: Mapping[str, Any]) -> None:
        now = self._now[ref.name]
        code = now.process.poll()
        if code is None:
            return
        now.log.join()
        container = live["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["name"]
        self._set_pod(now.pod, container, {"terminated": {"exitCode": int(code != 0)}}, "Failed" if code else "Succeeded")
        if code == 0:
            self._set(ref, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
            return
        num_failed = status.get("failed", 0) + 1
        state = "Retrying" if num_failed <= live["spec"].get("backoffLimit", 0) else "Failed"
        message = f"Job entrypoint command failed with exit code {code}"
        self._set(ref, jobDeploymentStatus=state, jobStatus="FAILED", reason="AppFailed", message=message, failed=num_failed)

    def _stop(self, ref: Ref) -> None:
        if (now := self._now.pop(ref.name, None)) is not None:
            _kill(now)
            self.cluster.delete(Ref("v1", "Pod", now.pod))

    def _release(self, live: dict[str, Any], ref: Ref) -> None:
        left = [each for each in live["metadata"].get("finalizers") or [] if each != FINALIZER]
        self.cluster.merge(ref, {"metadata": {"finalizers": left}})

    def _set(self, ref: Ref, **status: object) -> None:
        self.cluster.merge(ref, {"status": status}, subresource="status")

    def _set_pod(self, pod: str, container: str, state: Mapping[str, Any], phase: str) -> None:
        shown = {"name": container, "state": state, "ready": phase == "Running", "restartCount": 0, "image": "x", "imageID": "x"}
        self.cluster.merge(Ref("v1", "Pod", pod), {"status": {"phase": phase, "containerStatuses": [shown]}}, subresource="status")


def _kill(started: Started) -> None:
    """Ends a run with all that it started, as the end of its node does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    started.log.join()
