"""Brings a deployment into the state of its manifests: applies what is wanted, deletes what is no longer, and keeps a revision of it.

A run that is killed anywhere leaves a pending revision; the same command finds it and goes on, since each of its acts may be done twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import ConfigError
from pipelines.cluster import inventory, revisions
from pipelines.cluster.apply import apply, check_all
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref, in_install_order, ref_of
from pipelines.cluster.revisions import Revision

GONE_TIMEOUT_S = 180.0
RENEW_S = 30.0
Note = Callable[[str], None]
Fate = Literal["created", "changed", "unchanged", "replaced", "deleted", "kept"]


@dataclass(frozen=True)
class Change:
    """What became, or would become, of one object."""

    ref: Ref
    fate: Fate


def preview(cluster: Cluster, deployment: str, manifests: Sequence[dict[str, Any]], force: bool = False) -> list[Change]:
    """What `roll_out` would do, as the server says: nothing changes. Raises one ConfigError with all that the server refuses."""
    wanted = in_install_order(inventory.labelled(manifests, deployment))
    outdated = {ref_of(each) for each in wanted if inventory.is_outdated_job(cluster.get(ref_of(each)), each)}
    tried = check_all(cluster, [each for each in wanted if ref_of(each) not in outdated], force=force)
    members = inventory.members(cluster, deployment, revisions.history(cluster, deployment))
    deleted = inventory.refs(inventory.orphans(members, wanted))
    return [
        *(Change(each.ref, each.change) for each in tried),
        *(Change(ref, "replaced") for ref in sorted(outdated)),
        *(Change(ref, "deleted") for ref in deleted),
    ]


def roll_out(
    cluster: Cluster, deployment: str, chart: str, manifests: Sequence[dict[str, Any]], reason: str, note: Note, force: bool = False
) -> tuple[Revision, list[Change]]:
    """Applies the manifests and prunes what is no longer among them; gives the revision and what became of each object.

    Raises ConfigError, before anything has changed, with all that the server refuses; TransientError while another deploy is under way.
    """
    preview(cluster, deployment, manifests, force)
    wanted = in_install_order(inventory.labelled(manifests, deployment))
    revision = revisions.begin(cluster, deployment, chart, reason, wanted)
    note(f"{deployment}: revision {revision.number} ({reason})")
    try:
        changes = _apply_and_prune(cluster, revision, force, note)
    except ConfigError:
        revisions.mark(cluster, revision, "failed")
        raise
    revisions.finish(cluster, revision)
    return revision, changes


def roll_back(cluster: Cluster, deployment: str, number: int | None, note: Note, force: bool = False) -> tuple[Revision, list[Change]]:
    """Applies the manifests of an earlier revision, the last good one before the current where no number is given, as a new revision.

    Raises ConfigError where there is no such revision.
    """
    past = revisions.history(cluster, deployment)
    target = _rollback_target(past, deployment, number)
    reason = f"rollback to {target.number}"
    return roll_out(cluster, deployment, target.chart, target.manifests, reason, note, force)


def destroy(cluster: Cluster, deployment: str, with_data: bool, note: Note, more: Sequence[inventory.Kind] = ()) -> list[Change]:
    """Deletes the deployment's objects, those first that need others, and then its revisions. Volumes stay, but `with_data`.

    Raises ConfigError where nothing of it is there, TransientError where something does not go.
    """
    past = revisions.history(cluster, deployment)
    members = inventory.members(cluster, deployment, past, more)
    if not past and not members:
        raise ConfigError(
            f"{deployment}: nothing of that name is deployed in namespace {cluster.namespace}. Look at --name and --namespace."
        )
    changes: list[Change] = []
    for live in reversed(members):
        ref = ref_of(live)
        if inventory.is_kept(live) and not with_data:
            changes.append(Change(ref, "kept"))
            continue
        note(f"  delete   {ref}")
        cluster.delete(ref)
        changes.append(Change(ref, "deleted"))
    for change in changes:
        if change.fate == "deleted":
            cluster.wait_gone(change.ref, GONE_TIMEOUT_S)
    revisions.forget(cluster, deployment)  # last: while they are there, the same command finds what is left
    return changes


def _apply_and_prune(cluster: Cluster, revision: Revision, force: bool, note: Note) -> list[Change]:
    changes: list[Change] = []
    renewed_s = time.monotonic()
    for manifest in revision.manifests:
        changes.append(_apply(cluster, manifest, force))
        note(f"  {changes[-1].fate:<9} {changes[-1].ref}")
        if time.monotonic() - renewed_s > RENEW_S:
            revisions.renew(cluster, revision)
            renewed_s = time.monotonic()
    members = inventory.members(cluster, revision.deployment, revisions.history(cluster, revision.deployment))
    for live in inventory.orphans(members, revision.manifests):
        ref = ref_of(live)
        cluster.delete(ref)
        note(f"  deleted   {ref}")
        changes.append(Change(ref, "deleted"))
    return changes


def _apply(cluster: Cluster, manifest: dict[str, Any], force: bool) -> Change:
    ref = ref_of(manifest)
    if inventory.is_outdated_job(cluster.get(ref), manifest):
        cluster.delete(ref)
        cluster.wait_gone(ref, GONE_TIMEOUT_S)
        apply(cluster, manifest, force=force)
        return Change(ref, "replaced")
    return Change(ref, apply(cluster, manifest, force=force).change)


def _rollback_target(past: Sequence[Revision], deployment: str, number: int | None) -> Revision:
    """The revision to go back to."""
    if not past:
        raise ConfigError(f"{deployment}: nothing of that name was deployed. Look at --name and --namespace.")
    if number is not None:
        found = next((each for each in past if each.number == number), None)
        if found is None:
            kept = ", ".join(str(each.number) for each in past)
            raise ConfigError(f"{deployment}: revision {number} is not kept; {kept} are. Name one of them.")
        return found
    now = past[-1]
    before = [each for each in past[:-1] if each.state in ("deployed", "superseded") and each.manifests != now.manifests]
    if not before:
        raise ConfigError(f"{deployment}: there is no other revision to go back to than {now.number}. Deploy the older spec instead.")
    return before[-1]
