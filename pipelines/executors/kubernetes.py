"""Runs a step's program as a RayJob of KubeRay, in a Ray cluster of its own; artifacts travel by the store.

- The RayJob is rendered from helm/training, by the values that the driver was given, and applied by server-side apply.
- Its name follows from the step's slot, so a driver that died and starts again finds the one that runs and follows it: never two.
- A queue (Kueue) may suspend it, and KubeRay may start it again after a lost node; it goes on from its last checkpoint in the store.
- What ended is deleted, its log having been brought here. An interrupted driver leaves the RayJob running.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra.artifact_store import ArtifactStore
from infra.config import load_yaml
from infra.errors import ConfigError, SlipwayError
from infra.files import sha256_bytes
from infra.process import Job
from pipelines import charts
from pipelines.cluster.apply import apply
from pipelines.cluster.capabilities import kube_version
from pipelines.cluster.client import Cluster
from pipelines.cluster.pod_watch import PodWatch
from pipelines.cluster.rayjob_states import verdict
from pipelines.cluster.refs import Ref
from pipelines.executors.pod_log import copied_log
from pipelines.executors.rayjob_following import follow
from pipelines.executors.shipping import Shipment

API_VERSION, KIND = "ray.io/v1", "RayJob"
MAX_NAME_CHARS = 47  # KubeRay makes longer names of it, for a Ray cluster and its pods
GONE_TIMEOUT_S = 180.0
RELEASE = "slipway"
SUBMITTER, SUBMITTER_CONTAINER = "ray-submitter", "ray-job-submitter"
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
LOG_TAIL_LINES = 15
# Below the values that are given: what a release has once is not made for each job, nor needed for one from a laptop.
OF_ONE_JOB: dict[str, Any] = {
    "managedBy": "slipway",
    "monitor": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "serviceAccount": {"create": False},
}


class KubernetesExecutor:
    """Programs as RayJobs of one namespace."""

    def __init__(self, cluster: Cluster, store: ArtifactStore, home: Path, values: Mapping[str, Any]) -> None:
        url = (values.get("store") or {}).get("url") or store.place.url
        if url != store.place.url:
            raise ConfigError(f"the values say store.url {url}, and SLIPWAY_STORE is {store.place.url}. Make them the same.")
        self._cluster, self._store, self._home, self._values = cluster, store, home, values

    def run_to_end(self, module: str, job: Job, config_file: Path, log_file: Path, on_tick: Callable[[], None]) -> None:
        """Runs the program as a RayJob, or follows the one that runs already, and brings its output here.

        Raises what the program raised; where it left no word, the error that the state of its RayJob or of a pod means.
        """
        shipment = Shipment(self._store, self._home, module, job)
        ref = Ref(API_VERSION, KIND, job_name(shipment.name, self._store.place.url))
        if not shipment.is_done():
            self._start(shipment, ref)
            self._follow(shipment, ref, log_file, on_tick)
        self._clean_up(ref)
        shipment.collect()
        on_tick()

    def _start(self, shipment: Shipment, ref: Ref) -> None:
        """Applies the RayJob unless it is there and may still end well."""
        live = self._cluster.get(ref)
        if live is not None and (live["metadata"].get("deletionTimestamp") or verdict(live).phase in ("failed", "done")):
            self._clean_up(ref)
            self._cluster.wait_gone(ref, GONE_TIMEOUT_S)
            live = None
        if live is None:
            manifest = self._render(shipment, ref.name)
            shipment.send()
            apply(self._cluster, manifest)

    def _render(self, shipment: Shipment, name: str) -> dict[str, Any]:
        given = self._values.get("rayJob") or {}
        ray_job = {**given, "enabled": True, "name": name, "module": shipment.module, "job": shipment.order}
        num_workers = getattr(getattr(shipment.job, "train", None), "num_workers", None)
        if shipment.module == "training.finetune" and num_workers is not None:
            ray_job["numWorkers"] = list(num_workers) if isinstance(num_workers, tuple) else num_workers
        if (engine := getattr(getattr(shipment.job, "serve", None), "engine", None)) is not None:
            ray_job["engine"] = engine  # which has an image of its own
        values = charts.layered(OF_ONE_JOB, {"store": {"url": self._store.place.url}}, self._values, {"rayJob": ray_job})
        manifests = charts.render(
            "training", values, name=RELEASE, namespace=self._cluster.namespace, kube_version=kube_version(self._cluster),
            api_versions=[API_VERSION],
        )  # fmt: skip
        found = [manifest for manifest in manifests if manifest["kind"] == KIND]
        if len(found) != 1:
            raise ConfigError(f"the values give {len(found)} RayJobs where one is needed. Leave `pipeline` and `config` out of them.")
        return found[0]

    def _follow(self, shipment: Shipment, ref: Ref, log_file: Path, on_tick: Callable[[], None]) -> None:
        """Returns when there is a result to collect. Raises where the RayJob ended, or cannot begin, without one."""
        pods = PodWatch(self._cluster, {INSTANCE: ref.name})
        labels = {INSTANCE: ref.name, COMPONENT: SUBMITTER}
        try:
            with copied_log(self._cluster, labels, SUBMITTER_CONTAINER, log_file):
                ended = follow(self._cluster, ref, shipment, pods, on_tick)
        except KeyboardInterrupt:
            print_left_running(ref, self._cluster.namespace)
            raise
        if shipment.result() is not None or ended.error is None:
            return
        trouble = pods.worst()
        self._clean_up(ref)
        if isinstance(ended.error, ConfigError) or trouble is None:
            raise _with_log(ended.error, log_file)
        raise type(trouble.error)(f"{ended.error.message}\n{trouble.error.message}")

    def _clean_up(self, ref: Ref) -> None:
        """Deletes the RayJob; KubeRay's finalizer ends what still runs, and its cluster goes with it."""
        self._cluster.delete(ref, "Background")


def job_name(shipment: str, store: str) -> str:
    """A name that KubeRay takes (DNS-1035, 47 characters) for a program's, the same whenever it is asked.

    Another store gives another name: drivers of two stores do not find each other's jobs, whose results they would never see.
    """
    name = re.sub(r"[^a-z0-9]+", "-", shipment.lower()).strip("-")
    digest = sha256_bytes(f"{store}\n{shipment}".encode())[:8]
    return f"{name[: MAX_NAME_CHARS - len(digest) - 1].rstrip('-')}-{digest}"


def read_values(path: Path | None) -> dict[str, Any]:
    """The values of helm/training that RayJobs are rendered with; none where no file is named. Raises ConfigError on a bad one."""
    return load_yaml(path) if path else {}


def print_left_running(ref: Ref, namespace: str) -> None:
    """Says what an interrupt leaves, and how to end it."""
    stop = f"kubectl --namespace {namespace} delete rayjob {ref.name}"
    print(f"slipway: {ref} goes on; the same command follows it, and this ends it: {stop}", file=sys.stderr)


def _with_log(error: SlipwayError, log_file: Path) -> SlipwayError:
    """The error, with the end of the program's log where it says nothing of its own."""
    if type(error) is not SlipwayError or not log_file.is_file():
        return error
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return SlipwayError("\n".join([error.message, f"The end of its log {log_file}:", *lines]))
