"""Which objects belong to a deployment: all that carry its label, of the kinds that any of its revisions ever had.

An object that another object controls (the pods of a Deployment, the RayCluster of a RayService) is its controller's, whatever labels
were copied to it. One with Helm's `helm.sh/resource-policy: keep` stays when the rest goes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from infra.files import sha256_json
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref, in_install_order, ref_of
from pipelines.cluster.revisions import Revision

LABEL = "slipway.dev/deployment"
DIGEST = "slipway.dev/digest"
KEEP = "helm.sh/resource-policy"
DATA_KINDS = ("PersistentVolumeClaim",)
"""What holds what cannot be made again."""
Kind = tuple[str, str]


def labelled(manifests: Sequence[dict[str, Any]], deployment: str) -> list[dict[str, Any]]:
    """Copies of the manifests, each with the label by which it is found again; a Job, which cannot be changed, with its digest too."""
    marked = copy.deepcopy(list(manifests))
    for manifest in marked:
        manifest["metadata"].setdefault("labels", {})[LABEL] = deployment
        if manifest["kind"] == "Job":
            manifest["metadata"].setdefault("annotations", {})[DIGEST] = sha256_json(manifest)
    return marked


def is_outdated_job(live: dict[str, Any] | None, manifest: dict[str, Any]) -> bool:
    """Whether the Job in the cluster is another than the manifest's, so that it must make room: a Job's template never changes."""
    if live is None or manifest["kind"] != "Job":
        return False
    return bool((live["metadata"].get("annotations") or {}).get(DIGEST) != manifest["metadata"]["annotations"][DIGEST])


def kinds_of(manifest_sets: Iterable[Sequence[dict[str, Any]]]) -> list[Kind]:
    """The kinds in several sets of manifests, in a settled order."""
    return sorted({(manifest["apiVersion"], manifest["kind"]) for manifests in manifest_sets for manifest in manifests})


def members(cluster: Cluster, deployment: str, revisions: Sequence[Revision], more: Sequence[Kind] = ()) -> list[dict[str, Any]]:
    """The deployment's objects as they are in the cluster, those first that others need."""
    kinds = sorted({*kinds_of(revision.manifests for revision in revisions), *more})
    found = [live for api_version, kind in kinds for live in cluster.find(api_version, kind, {LABEL: deployment})]
    return in_install_order([live for live in found if not is_controlled(live)])


def orphans(members: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those objects that no manifest names any more and that may go, in the order to delete them in.

    The version of an API does not count: an object may have been written by an older one.
    """
    named = {_identity(manifest) for manifest in wanted}
    return [live for live in reversed(members) if _identity(live) not in named and not is_kept(live) and not _is_at_work(live)]


def is_controlled(live: dict[str, Any]) -> bool:
    """Whether another object made it, and deletes it with itself."""
    return any(owner.get("controller") for owner in live["metadata"].get("ownerReferences") or ())


def is_kept(live: dict[str, Any]) -> bool:
    """Whether it is to stay when nobody asks for it any more."""
    annotations = live["metadata"].get("annotations") or {}
    return live["kind"] in DATA_KINDS or annotations.get(KEEP) == "keep"


def _is_at_work(live: dict[str, Any]) -> bool:
    """Whether it is a Job that runs: a new spec must not end the run of the old one. A later deploy prunes it."""
    return live["kind"] == "Job" and bool((live.get("status") or {}).get("active"))


def refs(manifests: Iterable[dict[str, Any]]) -> list[Ref]:
    """The names of several objects."""
    return [ref_of(manifest) for manifest in manifests]


def _identity(manifest: dict[str, Any]) -> tuple[str, str, str]:
    group = manifest["apiVersion"].rpartition("/")[0]
    return group, manifest["kind"], manifest["metadata"]["name"]
