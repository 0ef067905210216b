"""Plays a cluster for `slipway run --executor kubernetes`: an API server, a KubeRay, nodes that share nothing but the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipelines.cluster.apply import apply
from pipelines.cluster.connect import connect
from tests import backends
from tests.cluster.accounts import DRIVER, driver_objects
from tests.cluster.kuberay import KubeRay, ray_definitions
from tests.cluster.server import serve
from tests.integration.conftest import chat_row

REPOSITORY = Path(__file__).resolve().parents[2]


def write_spec(folder: Path, model: Path) -> Path:
    """A spec of the toy model, as small as it gets: one format, one epoch, no server."""
    for name, numbers in (("train", range(0, 32)), ("heldout", range(100, 104))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    spec: dict[str, Any] = {
        "name": "toy",
        "base_model": f"file:{model}",
        "dataset": {"type": "files", "train": "train.jsonl", "heldout": "heldout.jsonl"},
        "train": {"epochs": 1, "batch_rows": 8, "micro_batch_rows": 8, "lora": {"rank": 4}},
        "quantize": {"formats": ["openvino-int8"]},
        "evaluate": {"metrics": ["exact_match_json"], "max_new_tokens": 4},
        "prove": {"heldout_prompts": 2, "max_new_tokens": 4, "tolerance": 8, "live": False},
        "gates": {"min_score": 0, "min_gain": -1, "max_quantization_drop": 1, "min_merge_agreement": 0},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


class ClusterRun:
    """A driver's place, and the cluster that it uses."""

    def __init__(self, place: Path, kuberay: KubeRay, spec: Path, tracking_uri: str) -> None:
        self.place, self.kuberay, self.spec, self.tracking_uri = place, kuberay, spec, tracking_uri

    def start(self, home: str) -> subprocess.Popen[str]:
        """Starts `slipway run` with the executor, on a machine whose home is the folder of that name."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "SLIPWAY_HOME": str(self.place / home),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "SLIPWAY_STORE": (self.place / "store").as_uri(),
            "SLIPWAY_KUBERNETES_VALUES": str(self.place / "values.yaml"),
            "KUBECONFIG": str(self.place / "kubeconfig"),
        }
        command = [sys.executable, "-m", "pipelines.cli", "run", str(self.spec), "--executor", "kubernetes", "--no-serve", "--json"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def orders(self) -> list[str]:
        """What has been started on a node, in order."""
        return [started.order for started in self.kuberay.started]


@contextmanager
def cluster_run(place: Path, model: Path) -> Iterator[ClusterRun]:
    """A cluster for the block; drivers have the rights that helm/training gives them, and no others."""
    (place / "values.yaml").write_text(yaml.safe_dump({"store": {"existingClaim": "shared"}}))
    options = ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--default-artifact-root", "mlflow-artifacts:/"]
    options += ["--artifacts-destination", str(place / "mlflow-files")]
    with backends.mlflow_server(place / "mlflow", options) as mlflow, serve() as server:
        server.install(ray_definitions())
        operator = connect(server.kubeconfig(place / "operator-kubeconfig"))
        for manifest in driver_objects().values():
            apply(operator, manifest)
        server.kubeconfig(place / "kubeconfig", token=server.account_token(operator.namespace, DRIVER))
        environment = {"SLIPWAY_STORE": (place / "store").as_uri(), "MLFLOW_TRACKING_URI": mlflow.url}
        with KubeRay(server, operator, place / "nodes", environment) as kuberay:
            yield ClusterRun(place, kuberay, write_spec(place, model), mlflow.url)
