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
    """Writes each manifest as a file of its own, numbered in the order of installation, and a kustomization that lists them.

    Files of an earlier render that are no longer wanted are removed; others in the folder stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, manifest in enumerate(manifests):
        names.append(f"{number:02}-{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml")
    listed = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace, "resources": names}
    for old in _listed_before(folder):
        if old not in names:
            (folder / old).unlink(missing_ok=True)
    for name, manifest in zip(names, manifests, strict=True):
        write_text_atomic(folder / name, yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=140))
    write_text_atomic(folder / "kustomization.yaml", yaml.safe_dump(listed, sort_keys=False))
    return [folder / name for name in [*names, "kustomization.yaml"]]


def _hooks(manifest: Mapping[str, Any]) -> list[str]:
    annotations = manifest["metadata"].get("annotations") or {}
    return [each.strip() for each in annotations.get(HOOK, "").split(",")]


def _listed_before(folder: Path) -> list[str]:
    """Files that an earlier render wrote; a name with a path in it is none of ours."""
    path = folder / "kustomization.yaml"
    if not path.is_file():
        return []
    listed = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return [name for name in listed.get("resources") or () if "/" not in name]
