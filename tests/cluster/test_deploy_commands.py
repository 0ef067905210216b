"""`slipway deploy`, `status`, `logs`, `rollback` and `destroy` with real charts, at the loopback API server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import ConfigError, SlipwayError, TransientError
from pipelines.cluster import readiness
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.inventory import LABEL
from pipelines.cluster.refs import Ref
from pipelines.deploy import commands, log_view
from tests.cluster.kuberay import NEEDS_KUBERAY, ray_definitions
from tests.cluster.server import Server

pytestmark = NEEDS_KUBERAY
Deploy = Callable[..., dict[str, Any]]


@pytest.fixture
def server(server: Server) -> Server:
    server.install(ray_definitions())
    return server


@pytest.fixture
def place(server: Server, tmp_path: Path) -> commands.Place:
    return commands.Place(server.kubeconfig(tmp_path / "kubeconfig"))


@pytest.fixture
def cluster(place: commands.Place) -> Cluster:
    return connect(place.kubeconfig, patience_s=5)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLIPWAY_STORE", "s3://bucket/slipway")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "base_model": "hf:some/model", "dataset": {"type": "smart_home"}}))
    return path


@pytest.fixture
def deploy(spec: Path, place: commands.Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Deploy:
    """Deploys with the values given, and gives what `--json` says."""

    def run(values: dict[str, Any], chart: Any = "training", wait_s: float | None = None, **options: Any) -> dict[str, Any]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        wanted = commands.Wanted(spec, [], chart, options.pop("name", None), "champion", options.pop("profile", None), [file])
        given = {"render_dir": None, "dry_run": None, "force": False, **options}
        capsys.readouterr()
        commands.deploy(wanted, place, wait_s=wait_s, as_json=True, **given)
        return dict(json.loads(capsys.readouterr().out))

    return run


def changes(said: dict[str, Any], change: str) -> set[str]:
    return {f"{row['kind']} {row['name']}" for row in said["changes"] if row["change"] == change}


def test_deploy_prunes_what_other_values_leave_out_and_rollback_brings_it_back(
    deploy: Deploy, place: commands.Place, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    first = deploy({"pipeline": {"schedule": "0 3 * * *"}})
    assert first["revision"] == 1
    assert "CronJob toy-training-schedule" in changes(first, "created")
    second = deploy({})
    assert "CronJob toy-training-schedule" in changes(second, "deleted")
    assert cluster.find("batch/v1", "CronJob") == []
    commands.rollback("toy-training", place, None, None, False, as_json=True)
    back = json.loads(capsys.readouterr().out)
    assert back["revision"] == 3
    assert changes(back, "created") == changes(second, "deleted")


def test_status_shows_revisions_and_objects_and_nothing_is_an_error(
    deploy: Deploy, place: commands.Place, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy({"pipeline": {"schedule": "0 3 * * *", "suspend": True}})
    commands.status("toy-training", place, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [(each["number"], each["state"]) for each in said["revisions"]] == [(1, "deployed")]
    assert {"kind": "CronJob", "name": "toy-training-schedule", "phase": "done", "text": "it is suspended"} in said["objects"]
    commands.status("toy-training", place, as_json=False)
    assert "it is suspended" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="nothing of that name is deployed"):
        commands.status("other", place, as_json=True)


def test_destroy_leaves_nothing_and_ends_runs_that_are_under_way(deploy: Deploy, place: commands.Place, cluster: Cluster) -> None:
    deploy({"pipeline": {"schedule": "0 3 * * *"}})
    running = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "run", "labels": {LABEL: "toy-training"}}}
    cluster.create({**running, "spec": {"entrypoint": "python -m x"}})
    commands.destroy("toy-training", place, with_data=False, as_json=True)
    for api, kind in (("ray.io/v1", "RayJob"), ("batch/v1", "CronJob"), ("v1", "ConfigMap"), ("v1", "ServiceAccount")):
        assert cluster.find(api, kind, {LABEL: "toy-training"}) == [], kind
    assert cluster.find("v1", "ConfigMap") == []


def test_trial_at_the_server_says_what_would_be_and_changes_nothing(deploy: Deploy, server: Server) -> None:
    version = server.objects.store.version
    said = deploy({"pipeline": {"schedule": "0 3 * * *"}}, dry_run="server")
    assert said["revision"] is None
    assert "CronJob toy-training-schedule" in changes(said, "created")
    assert server.objects.store.version == version


def test_trial_at_the_client_and_render_ask_no_cluster(deploy: Deploy, server: Server, tmp_path: Path) -> None:
    asked = len(server.log)
    manifests = deploy({}, dry_run="client")["manifests"]
    assert {each["kind"] for each in manifests} >= {"ServiceAccount", "NetworkPolicy"}
    files = deploy({}, render_dir=tmp_path / "manifests")["files"]
    assert len(files) == len(manifests)
    assert len(server.log) == asked


def test_name_of_another_chart_is_refused(deploy: Deploy, cluster: Cluster) -> None:
    deploy({}, name="one")
    with pytest.raises(ConfigError, match="of the chart training"):
        deploy({}, chart="tracking", name="one")
    assert cluster.find("v1", "ServiceAccount", {LABEL: "one"})


def test_wait_tells_what_does_not_come_up(deploy: Deploy, cluster: Cluster) -> None:
    with pytest.raises(TransientError, match=r"not ready after 0 s"):
        deploy({}, chart="tracking", wait_s=0.0)
    assert cluster.find("v1", "Service", {LABEL: "toy-tracking"})


def test_logs_are_of_the_deployments_pods_and_name_them(server: Server, cluster: Cluster) -> None:
    for name, component in (("a", "gateway"), ("b", "model")):
        labels = {LABEL: "toy", log_view.COMPONENT: component}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}}
        cluster.create({**pod, "spec": {"containers": [{"name": "main", "image": "x:1"}]}})
        cluster.merge(Ref("v1", "Pod", name), {"status": {"phase": "Running"}}, subresource="status")
        server.write_log("default", name, f"first of {name}\nsecond of {name}", "main")
    assert list(log_view.recent(cluster, "toy", None, 1, False)) == ["[a main] second of a", "[b main] second of b"]
    assert list(log_view.recent(cluster, "toy", "model", 2, False)) == ["[b main] first of b", "[b main] second of b"]
    with pytest.raises(ConfigError, match="no pod of the component absent"):
        list(log_view.recent(cluster, "toy", "absent", 2, False))


def test_followed_logs_come_as_they_are_printed_from_pods_that_come_later_too(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_view, "LOOK_AGAIN_S", 0.05)
    lines = log_view.followed(cluster, "toy", None)
    for name in ("early", "late"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {LABEL: "toy"}}}
        cluster.create({**pod, "spec": {"containers": [{"name": "main", "image": "x:1"}]}})
        cluster.merge(Ref("v1", "Pod", name), {"status": {"phase": "Running"}}, subresource="status")
        server.write_log("default", name, f"of {name}", "main")
        assert next(lines) == f"[{name} main] of {name}"
    lines.close()  # type: ignore[attr-defined]


def test_commands_end_by_the_exit_code_of_their_error(server: Server, tmp_path: Path) -> None:
    file = server.kubeconfig(tmp_path / "kubeconfig")
    command = [sys.executable, "-m", "pipelines.cli", "status", "absent", "--target", "kubernetes", "--kubeconfig", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "absent: nothing of that name is deployed in namespace default" in done.stderr


SERVED = {"config": {"model": {"type": "store", "digest": "a" * 64}, "serve": {"allow_unsigned": ["toy"]}}}


def test_served_model_gets_a_token_once_which_goes_with_the_deployment(deploy: Deploy, place: commands.Place, cluster: Cluster) -> None:
    said = deploy(SERVED, chart="serving")
    assert {"RayService toy-model", "Deployment toy-gateway"} <= changes(said, "created")
    secret = Ref("v1", "Secret", "toy-front")
    first = cluster.get(secret)
    assert first is not None
    again = deploy({**SERVED, "gateway": {"replicas": 3}}, chart="serving")
    assert "Deployment toy-gateway" in changes(again, "changed")
    assert cluster.get(secret) == first
    commands.destroy("toy", place, with_data=False, as_json=True)
    assert cluster.get(secret) is None


def test_wait_for_a_served_model_ends_when_kuberay_says_that_it_serves(
    deploy: Deploy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "POLL_S", 0.02)
    deploy(SERVED, chart="serving")
    replicas = {"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2, "observedGeneration": 1}
    cluster.merge(Ref("apps/v1", "Deployment", "toy-gateway"), {"status": replicas}, subresource="status")
    service = Ref("ray.io/v1", "RayService", "toy-model")
    failed = {"applicationStatuses": {"slipway": {"status": "DEPLOY_FAILED", "message": "no such artifact"}}, "rayClusterName": "c"}
    cluster.merge(service, {"status": {"pendingServiceStatus": failed}}, subresource="status")
    with pytest.raises(SlipwayError, match=r"application slipway could not be deployed \(no such artifact\)"):
        deploy(SERVED, chart="serving", wait_s=20.0)
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "NonZeroServeEndpoints",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    status = {"pendingServiceStatus": None, "conditions": [ready], "observedGeneration": 1, "numServeEndpoints": 2}
    cluster.merge(service, {"status": status}, subresource="status")
    assert deploy(SERVED, chart="serving", wait_s=20.0)["revision"] == 3
