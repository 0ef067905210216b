"""What checkov finds in rendered manifests, and who holds a token of the cluster.

checkov knows no kinds of KubeRay, so the pods of Ray are shown to it as pods.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.charts.pods import CLUSTERS, Document, PodTemplate, pod_templates, told

PROGRAM = Path(__file__).parents[2] / ".venv-checkov" / "bin" / "checkov"
CONFIG = Path(__file__).with_name("checkov.yaml")
TIMEOUT_S = 300.0
MAY_CALL_THE_CLUSTER = {"driver"}
"""Containers of programs that call the API server; the autoscaler's token is mounted in its own container alone."""


def scan_problems(documents: Iterable[Document], say: Callable[[str], object], program: Path = PROGRAM) -> list[str]:
    """Failed checks, a line each; says so where checkov is not here (`make charts` puts it there). Raises ValueError on its own failure."""
    distinct = {json.dumps(each, sort_keys=True): each for document in documents for each in shown(document)}
    found = [line for document in distinct.values() for line in token_problems(document)]
    if not program.is_file():
        say("checkov is not here: `make charts` scans with it")
        return found
    with tempfile.TemporaryDirectory() as folder:
        for index, document in enumerate(distinct.values()):
            (Path(folder) / f"{index}-{document['kind']}.yaml".lower()).write_text(yaml.safe_dump(dict(document)))
        command = [program, "--config-file", CONFIG, "--directory", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    results = json.loads(done.stdout)
    if not results.get("summary", results).get("passed"):
        raise ValueError(f"checkov checked nothing, it ended with {done.returncode}: {done.stderr[-500:]}")
    failed = results["results"]["failed_checks"]
    return found + sorted({f"{each['resource']}: {each['check_id']} {each['check_name']}" for each in failed})


def shown(document: Document) -> list[dict[str, Any]]:
    """What checkov is given of an object."""
    if document["kind"] not in CLUSTERS:
        return [dict(document)]
    return [_as_pod(f"{document['metadata']['name']}-{index}", pod) for index, pod in enumerate(pod_templates(document))]


def _as_pod(name: str, pod: PodTemplate) -> dict[str, Any]:
    """A pod of Ray; one that ends with its job as a Job, which is not asked for probes. The autoscaler's container is KubeRay's own."""
    containers = [container for container in pod.spec.get("containers", ()) if container["name"] != "autoscaler"]
    spec = {**pod.spec, "containers": containers}
    if pod.kind == "RayJob":
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": {"spec": spec}}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def token_problems(document: Document) -> list[str]:
    """Pods that get a token of the cluster which no program in them needs."""
    pods = [document["spec"]] if document["kind"] == "Pod" else [pod.spec for pod in pod_templates(document)]
    return [
        f"{told(document)}: automountServiceAccountToken is not false"
        for spec in pods
        if spec.get("automountServiceAccountToken") is not False
        and not MAY_CALL_THE_CLUSTER & {container["name"] for container in spec.get("containers", ())}
    ]
