"""The driver as helm/training puts it into a pod: with the values of its ConfigMap, and as the account whose Role the chart makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.artifact_store import open_store
from pipelines.cluster import rollout
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref
from pipelines.deploy import rendering
from pipelines.executors import rayjob_following
from pipelines.executors.kubernetes import KubernetesExecutor, job_name
from tests.cluster.accounts import connect_as
from tests.cluster.kuberay import NEEDS_KUBERAY, KubeRay, ray_definitions
from tests.cluster.server import serve
from tests.cluster.toy_step import ToyJob

pytestmark = NEEDS_KUBERAY


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, KubeRay]]:
    monkeypatch.setattr(rayjob_following, "STORE_S", 0.05)
    monkeypatch.setattr(rayjob_following, "PODS_S", 0.05)
    with serve() as server:
        server.install(ray_definitions())
        with KubeRay(server, connect(server.kubeconfig(tmp_path / "kubeconfig")), tmp_path / "nodes") as kuberay:
            yield tmp_path, kuberay


def test_driver_does_its_work_by_the_values_and_the_rights_that_the_chart_gives_it(place: tuple[Path, KubeRay]) -> None:
    folder, kuberay = place
    url = (folder / "store").as_uri()
    spec = {"name": "toy", "base_model": "hf:some/model", "dataset": {"type": "smart_home"}}
    values = {
        "deployment": "toy-training",
        "pipeline": {"enabled": True},
        "config": spec,
        "store": {"url": url, "existingClaim": "shared"},
        "tracking": {"uri": "http://mlflow:5000"},
        "labels": {"cost-centre": "a"},
    }
    plain = connect(folder / "kubeconfig")
    rollout.roll_out(
        plain, "toy-training", "training", rendering.render("training", values, "toy", "default", None), "test", lambda _: None
    )
    config = plain.get(Ref("v1", "ConfigMap", "toy-pipeline"))
    assert config is not None
    assert yaml.safe_load(config["data"]["spec.yaml"]) == spec

    store, home = open_store(url), folder / "home"
    slot = home / "staging" / "toy-0123456789abcdef"
    slot.mkdir(parents=True)
    seen: list[dict[str, Any]] = []
    ref = Ref("ray.io/v1", "RayJob", job_name(f"slipway-{slot.name}", store.place.url))

    def look() -> None:
        if (live := plain.get(ref)) is not None:
            seen.append(live)

    executor = KubernetesExecutor(connect_as(plain, "toy-driver"), store, home, yaml.safe_load(config["data"]["kubernetes.yaml"]))
    job = ToyJob(output_dir=slot / "output", progress_file=slot / "progress.jsonl")
    executor.run_to_end("tests.cluster.toy_step", job, slot / "config.json", home / "log", look)

    assert (slot / "output" / "text").read_text() == "made"
    labels = seen[0]["metadata"]["labels"]
    assert (labels["slipway.dev/deployment"], labels["cost-centre"]) == ("toy-training", "a")
    head = seen[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    accounts = {live["metadata"]["name"] for live in plain.find("v1", "ServiceAccount", {"slipway.dev/deployment": "toy-training"})}
    assert head["serviceAccountName"] in accounts
    assert len(kuberay.started) == 1
