"""helm/tracking, rendered by the real helm; one test starts the very server that it describes."""

from __future__ import annotations

import base64
import http.client
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.errors import ConfigError
from infra.network import free_port
from infra.tracking_chart import Values
from pipelines.charts import render
from tests.charts.objects import environment, only

SHARED = {"database": {"existingSecret": "db"}, "artifacts": {"destination": "s3://bucket/mlflow", "existingSecret": "keys"}}
START_TIMEOUT_S = 120.0
ADMIN = ("admin", "a-long-password-of-a-test")


def kinds(objects: list[dict[str, Any]]) -> set[str]:
    """Which kinds were rendered."""
    return {each["kind"] for each in objects}


def test_server_by_default_has_one_volume_which_outlives_the_release() -> None:
    """SQLite and all models are on it; and two servers never write it at once."""
    objects = render("tracking", {}, name="mlflow")
    deployment, claim = only(objects, "Deployment"), only(objects, "PersistentVolumeClaim")
    volume = next(each for each in deployment["spec"]["template"]["spec"]["volumes"] if each["name"] == "data")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert deployment["spec"]["strategy"]["type"] == "Recreate"
    assert "Job" not in kinds(objects)


def test_server_with_database_and_bucket_needs_no_volume_and_is_migrated_first() -> None:
    """The migration and the server read one address."""
    objects = render("tracking", {**SHARED, "replicas": 3}, name="mlflow")
    job, deployment = only(objects, "Job"), only(objects, "Deployment")
    assert "PersistentVolumeClaim" not in kinds(objects)
    assert "PodDisruptionBudget" in kinds(objects)
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    pods = [each["spec"]["template"]["spec"]["containers"][0] for each in (job, deployment)]
    addresses = [next(var["valueFrom"] for var in pod["env"] if var["name"] == "MLFLOW_BACKEND_STORE_URI") for pod in pods]
    assert addresses[0] == addresses[1] == {"secretKeyRef": {"name": "db", "key": "uri"}}


def test_service_reaches_the_pods_of_the_server_and_not_the_migration() -> None:
    """By labels, and by the name of the port."""
    objects = render("tracking", SHARED, name="mlflow")
    service, server, migration = only(objects, "Service"), only(objects, "Deployment"), only(objects, "Job")
    selector = service["spec"]["selector"].items()
    assert selector <= server["spec"]["template"]["metadata"]["labels"].items()
    assert not selector <= migration["spec"]["template"]["metadata"]["labels"].items()
    ports = {port["name"] for port in server["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports


def test_ingress_host_is_one_that_the_server_answers_to() -> None:
    """MLflow refuses requests by names it does not know."""
    values = {"ingress": {"enabled": True, "host": "mlflow.example.com", "tlsSecret": "tls"}}
    objects = render("tracking", values, name="mlflow")
    (rule,) = only(objects, "Ingress")["spec"]["rules"]
    arguments = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    allowed = next(each for each in arguments if each.startswith("--allowed-hosts=")).partition("=")[2].split(",")
    assert rule["host"] in allowed
    assert not {"*", "*:*"} & set(allowed)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"replicas": 2}, r"set database\.existingSecret"),
        ({"ingress": {"enabled": True}}, r"ingress\.host"),
        ({"ingress": {"enabled": True, "host": "a.b"}}, r"ingress\.tlsSecret"),
        ({"route": {"enabled": True, "parentRefs": [{"name": "gate"}]}}, r"no gateway\.networking\.k8s\.io"),
        ({"artifacts": {"destination": "/tmp/x"}}, "/artifacts/destination"),
        ({"config": {"worker": 3}}, "/config.*worker"),
    ],
)
def test_values_that_are_wrong_are_refused_with_their_path(values: dict[str, Any], text: str) -> None:
    """By the schema where it can, by the template where two values contradict each other."""
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        render("tracking", values, name="mlflow")


def test_several_servers_on_one_volume_are_refused_by_the_model() -> None:
    """`slipway deploy` asks the model before it renders."""
    with pytest.raises(ValidationError, match="replicas 2"):
        Values.model_validate({"replicas": 2})


@pytest.mark.slow
def test_rendered_migration_and_server_run_and_answer_only_users_and_only_to_their_names(tmp_path: Path) -> None:
    """The containers' own commands and variables, with their mounts moved below a folder; nothing is written elsewhere in it."""
    values = {"database": {"existingSecret": "db"}, "authentication": {"existingSecret": "auth"}, "config": {"workers": 1}}
    objects = render("tracking", values, name="mlflow", namespace="mlops")
    machine = Machine(tmp_path)
    subprocess.run(
        machine.command(only(objects, "Job")), env=machine.variables(only(objects, "Job")), cwd=machine.data, check=True, timeout=120
    )
    deployment = only(objects, "Deployment")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            machine.command(deployment), cwd=machine.data, env=machine.variables(deployment), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while machine.status("/health", "10.1.2.3:5000", None) != 200:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.2)
        experiments = "/api/2.0/mlflow/experiments/search?max_results=1"
        assert machine.status(experiments, "mlflow.mlops.svc.cluster.local:5000", ADMIN) == 200
        assert machine.status(experiments, "mlflow:5000", ADMIN) == 200
        assert machine.status(experiments, "mlflow:5000", None) == 401
        assert machine.status(experiments, "mlflow.mlops.svc.attacker.example", ADMIN) == 403
    finally:
        process.terminate()
        process.wait(30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log", "secrets", "tmp"]


class Machine:
    """Stands for a node: it gives a container its Secrets and its mounts, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.data, self.scratch, self.port = folder / "data", folder / "tmp", free_port()
        for made in (self.data, self.scratch, folder / "secrets"):
            made.mkdir()
        self._moved = {"/var/lib/slipway": str(self.data), "/etc/slipway/auth": str(folder / "secrets")}
        (folder / "secrets" / "basic_auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.data}/users.db\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self._secrets = {
            ("db", "uri"): f"sqlite:///{self.data}/mlflow.db",
            ("auth", "admin-username"): ADMIN[0],
            ("auth", "admin-password"): ADMIN[1],
            ("auth", "flask-secret-key"): "k" * 32,
        }

    def command(self, manifest: dict[str, Any]) -> list[str]:
        """What the pod's container runs, with Python's mlflow for the image's."""
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        variables = self.variables(manifest)
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], self._here(each)) for each in container["args"]]
        return [sys.executable, "-m", "mlflow", *arguments]

    def variables(self, manifest: dict[str, Any]) -> dict[str, str]:
        """Its environment."""
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        references = [(each["name"], each["valueFrom"]["secretKeyRef"]) for each in container["env"] if "valueFrom" in each]
        plain = {name: str(self.scratch) if value == "/tmp" else self._here(value) for name, value in environment(container).items()}
        secret = {name: self._secrets[reference["name"], reference["key"]] for name, reference in references}
        return {"PATH": os.environ["PATH"], "TMPDIR": str(self.scratch), **plain, **secret}

    def _here(self, text: str) -> str:
        for theirs, ours in self._moved.items():
            text = text.replace(theirs, ours)
        return text.replace("0.0.0.0", "127.0.0.1").replace("--port=5000", f"--port={self.port}")

    def status(self, path: str, host: str, user: tuple[str, str] | None) -> int:
        """Status of a GET under a name, by a user or by none; 0 while nothing listens."""
        headers = {"Host": host}
        if user is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        except ConnectionError:
            return 0
        finally:
            connection.close()
