"""Server-side apply: this program owns the fields that it sends, others keep theirs, and a clash is an error and not a silent win.

Source: kubernetes.io/docs/reference/using-api/server-side-apply
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import ConfigError
from pipelines.cluster.client import OURS, Cluster
from pipelines.cluster.refs import Ref, ref_of

# What the server writes of its own accord; it differs where nothing that we sent does.
OF_THE_SERVER = ("managedFields", "resourceVersion", "generation", "creationTimestamp", "uid")
Change = Literal["created", "changed", "unchanged"]


@dataclass(frozen=True)
class Applied:
    """What became of one manifest."""

    ref: Ref
    change: Change
    live: dict[str, Any]
    """The object as the server has it now, or would have after a dry run."""


def apply(cluster: Cluster, manifest: Mapping[str, Any], *, force: bool = False, dry_run: bool = False) -> Applied:
    """The object after an apply of the manifest.

    Raises ConfigError for a manifest that the server refuses, and for fields that belong to another manager unless `force` takes them over.
    """
    ref = ref_of(manifest)
    path = cluster.path_of(ref)
    before = cluster.get(ref)
    query = {**OURS, "fieldValidation": "Strict", "force": str(force).lower(), **({"dryRun": "All"} if dry_run else {})}
    live = cluster.request("PATCH", path, f"apply {ref}", query=query, body=manifest, content_type="application/apply-patch+yaml").body
    if before is None:
        return Applied(ref, "created", live)
    return Applied(ref, "unchanged" if asked_of(before) == asked_of(live) else "changed", live)


def check_all(cluster: Cluster, manifests: Sequence[Mapping[str, Any]], *, force: bool = False) -> list[Applied]:
    """What an apply of each manifest would do, as the server says.

    What lies in a namespace, or is of a kind, that these manifests themselves bring cannot be asked about before they are there.
    Raises one ConfigError that lists everything that the server refuses.
    """
    brought = _brought(cluster, manifests)
    tried: list[Applied] = []
    problems: list[str] = []
    for manifest in manifests:
        ref = ref_of(manifest)
        if (ref.namespace or cluster.namespace) in brought or (ref.api_version, ref.kind) in brought:
            tried.append(Applied(ref, "created", dict(manifest)))
            continue
        try:
            tried.append(apply(cluster, manifest, force=force, dry_run=True))
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError(f"the cluster refuses {len(problems)} of {len(manifests)} objects\n" + "\n".join(problems))
    return tried


def asked_of(live: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its status and what the server writes of its own accord."""
    metadata = {key: value for key, value in live["metadata"].items() if key not in OF_THE_SERVER}
    return {**{key: value for key, value in live.items() if key != "status"}, "metadata": metadata}


def _brought(cluster: Cluster, manifests: Sequence[Mapping[str, Any]]) -> set[str | tuple[str, str]]:
    """Namespaces, and kinds, that the manifests bring and that are not there yet."""
    brought: set[str | tuple[str, str]] = set()
    for manifest in manifests:
        if manifest.get("kind") not in ("Namespace", "CustomResourceDefinition") or cluster.get(ref_of(manifest)) is not None:
            continue
        if manifest["kind"] == "Namespace":
            brought.add(manifest["metadata"]["name"])
        else:
            spec = manifest["spec"]
            brought |= {(f"{spec['group']}/{version['name']}", spec["names"]["kind"]) for version in spec["versions"]}
    return brought
