"""The real kubectl as a client of the loopback server: it would stumble where that is not what it knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.charts import TOOLS_DIR
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import ref_of
from tests.cluster.samples import config_map, deployment, pod
from tests.cluster.server import Server

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Run:
    """Runs a program of `make tools` on the server."""

    def program(name: str, *arguments: str, given: object = None) -> subprocess.CompletedProcess[str]:
        found = shutil.which(name, path=str(TOOLS_DIR)) or shutil.which(name)
        if found is None:
            pytest.skip(f"no {name}: `make tools` brings it")
        environment = {**os.environ, "KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")), "HOME": str(tmp_path)}
        text = json.dumps(given) if given else ""
        return subprocess.run([found, *arguments], input=text, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return program


def test_kubectl_applies_reads_labels_and_deletes(run: Run) -> None:
    made = config_map()
    name = made["metadata"]["name"]
    assert run("kubectl", "apply", "--server-side", "-f", "-", given=made).stdout == f"configmap/{name} serverside-applied\n"
    assert run("kubectl", "label", "cm", name, "tier=front").returncode == 0
    found = run("kubectl", "get", "cm", "-l", "tier=front", "-o", "jsonpath={.items[*].metadata.name}")
    assert found.stdout == name
    assert run("kubectl", "delete", "cm", name, "--wait").returncode == 0
    assert "NotFound" in run("kubectl", "get", "cm", name).stderr


def test_kubectl_is_told_of_a_clash_and_of_an_unknown_field(run: Run, cluster: Cluster) -> None:
    made = deployment()
    assert run("kubectl", "apply", "--server-side", "--field-manager=alice", "-f", "-", given=made).returncode == 0
    made["spec"]["template"]["spec"]["containers"][0]["image"] = "registry.example/app:2"
    clash = run("kubectl", "apply", "--server-side", "--field-manager=bob", "-f", "-", given=made)
    assert clash.returncode != 0
    assert 'conflict with "alice"' in clash.stderr
    unknown = run("kubectl", "apply", "-f", "-", given=deployment(replica=2))
    assert unknown.returncode != 0
    assert 'unknown field "spec.replica"' in unknown.stderr
    assert len(cluster.find("apps/v1", "Deployment")) == 1


def test_kubectl_waits_for_a_state_and_reads_the_log(run: Run, server: Server, cluster: Cluster) -> None:
    made = pod()
    name = made["metadata"]["name"]
    cluster.create(made)
    server.write_log("default", name, "one\ntwo")
    cluster.merge(ref_of(made), {"status": {"phase": "Succeeded"}}, subresource="status")
    assert run("kubectl", "wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=10s").returncode == 0
    assert run("kubectl", "logs", "-f", name).stdout == "one\ntwo\n"
