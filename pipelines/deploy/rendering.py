"""From values to manifests, for a cluster that is there or for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from infra.errors import ConfigError
from infra.files import write_text_atomic
from pipelines import charts
from pipelines.charts import Chart
from pipelines.cluster.refs import in_install_order

HOOK = "helm.sh/hook"
RAY_API = "ray.io/v1"
LIST_NAME = ".slipway-render"
"""In a folder of rendered manifests: the names of the files that we wrote."""
WITHOUT_NAMESPACE = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace", "PriorityClass")


def render(
    chart: Chart,
    values: Mapping[str, Any],
    name: str,
    namespace: str,
    profile: str | None,
    kube_version: str | None = None,
    api_versions: Sequence[str] = (RAY_API,),
) -> list[dict[str, Any]]:
    """The manifests of a deployment in the order of installation, without what only Helm runs (its tests).

    Raises ConfigError with the path of a value that is wrong, and where an object has no namespace of the deployment's own.
    """
    rendered = charts.render(
        chart, values, name=name, namespace=namespace, kube_version=kube_version, api_versions=api_versions, profile=profile
    )
    wanted = [manifest for manifest in rendered if "test" not in _hooks(manifest)]
    for manifest in wanted:
        if manifest["metadata"].get("namespace") not in (None, namespace):
            found = f"{manifest['kind']} {manifest['metadata']['name']} is of namespace {manifest['metadata']['namespace']}"
            raise ConfigError(f"{found}. A deployment is of one namespace: {namespace} here; deploy that part by itself.")
    return in_install_order(wanted)


def write_manifests(manifests: Sequence[dict[str, Any]], namespace: str, folder: Path) -> list[Path]:
    """Writes each manifest as a file of its own, as `kubectl apply -f`, Argo CD and Flux read a folder.

    What an earlier render wrote and is no longer wanted is removed; other files in the folder stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{each['kind'].lower()}-{each['metadata']['name']}.yaml": _placed(each, namespace) for each in manifests}
    listed = folder / LIST_NAME
    before = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    for name in before:
        if name not in files and "/" not in name:
            (folder / name).unlink(missing_ok=True)
    for name, manifest in files.items():
        write_text_atomic(folder / name, yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=140))
    write_text_atomic(listed, "".join(f"{name}\n" for name in files))
    return [folder / name for name in files]


def _placed(manifest: Mapping[str, Any], namespace: str) -> dict[str, Any]:
    """The manifest with its namespace said, where its kind has one: what it names elsewhere was rendered for that one too."""
    if manifest["kind"] in WITHOUT_NAMESPACE:
        return dict(manifest)
    metadata = manifest["metadata"]
    return {**manifest, "metadata": {"name": metadata["name"], "namespace": namespace, **metadata}}


def _hooks(manifest: Mapping[str, Any]) -> list[str]:
    annotations = manifest["metadata"].get("annotations") or {}
    return [each.strip() for each in annotations.get(HOOK, "").split(",")]
