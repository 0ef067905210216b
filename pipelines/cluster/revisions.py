"""What was deployed, revision by revision: each is one ConfigMap that holds the rendered manifests, packed.

- A revision is written before anything of it is applied, so that a deploy that was killed is known, and goes on under the same number.
- It is never changed but for its state; going back makes a new revision of the old manifests.
- It carries no label of the deployment's inventory: pruning must not take it.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import ArtifactError, ConfigError, TransientError
from infra.lease import Holder
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref, ref_of

OF_LABEL = "slipway.dev/revision-of"
STATE_LABEL = "slipway.dev/revision-state"
HOLDER = "slipway.dev/holder"
CONTENT_KEY = "manifests.json.gz"
MAX_CONTENT_BYTES = 900_000  # a ConfigMap holds 1 MiB, and base64 is not counted
KEPT = 10
State = Literal["pending", "deployed", "superseded", "failed"]


@dataclass(frozen=True)
class Revision:
    """One state of a deployment."""

    deployment: str
    number: int
    state: State
    chart: str
    reason: str
    """Why it was made, for people."""
    made: str
    """When, in UTC."""
    manifests: tuple[dict[str, Any], ...]
    holder: Holder | None = None
    """Who applies it, while it is pending."""

    @property
    def name(self) -> str:
        """Of its ConfigMap."""
        return f"{self.deployment}-rev-{self.number}"


def pack(manifests: Sequence[dict[str, Any]]) -> str:
    """The manifests as base64 of gzip of JSON; equal manifests give equal text. Raises ConfigError where they are too large to keep."""
    content = gzip.compress(json.dumps(list(manifests), sort_keys=True, separators=(",", ":")).encode(), mtime=0)
    if len(content) > MAX_CONTENT_BYTES:
        raise ConfigError(f"the manifests take {len(content)} bytes packed; {MAX_CONTENT_BYTES} can be kept. Deploy it in several parts.")
    return base64.b64encode(content).decode()


def to_config_map(revision: Revision) -> dict[str, Any]:
    """The object that keeps a revision."""
    labels = {
        "app.kubernetes.io/part-of": "slipway",
        "app.kubernetes.io/managed-by": "slipway",
        OF_LABEL: revision.deployment,
        STATE_LABEL: revision.state,
    }
    annotations = {} if revision.holder is None else {HOLDER: revision.holder.model_dump_json()}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": revision.name, "labels": labels, "annotations": annotations},
        "immutable": True,
        "data": {"number": str(revision.number), "chart": revision.chart, "reason": revision.reason, "made": revision.made},
        "binaryData": {CONTENT_KEY: pack(revision.manifests)},
    }


def from_config_map(live: dict[str, Any]) -> Revision:
    """The revision that an object keeps. Raises ArtifactError where it is not one of ours."""
    metadata, data = live["metadata"], live.get("data") or {}
    held = (metadata.get("annotations") or {}).get(HOLDER)
    try:
        content = gzip.decompress(base64.b64decode(live["binaryData"][CONTENT_KEY]))
        return Revision(
            deployment=metadata["labels"][OF_LABEL],
            number=int(data["number"]),
            state=metadata["labels"][STATE_LABEL],
            chart=data["chart"],
            reason=data["reason"],
            made=data["made"],
            manifests=tuple(json.loads(content)),
            holder=Holder.model_validate_json(held) if held else None,
        )
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ArtifactError(
            f"ConfigMap {metadata['name']} should keep a revision and does not ({error}). Delete it, and deploy again."
        ) from error


def history(cluster: Cluster, deployment: str) -> list[Revision]:
    """All revisions that are kept, the oldest first."""
    found = [from_config_map(live) for live in cluster.find("v1", "ConfigMap", {OF_LABEL: deployment})]
    return sorted(found, key=lambda revision: revision.number)


def current(revisions: Sequence[Revision]) -> Revision | None:
    """The newest revision that was applied to the end."""
    return next((each for each in reversed(revisions) if each.state == "deployed"), None)


def begin(cluster: Cluster, deployment: str, chart: str, reason: str, manifests: Sequence[dict[str, Any]]) -> Revision:
    """The revision to apply: a new one, or the one of the same manifests whose deploy was cut off.

    Raises TransientError while another deploy of the same name is under way.
    """
    revisions = history(cluster, deployment)
    newest = revisions[-1] if revisions else None
    if newest is not None and newest.state == "pending":
        _refuse_while_held(newest)
        if newest.manifests == tuple(manifests):
            return renew(cluster, newest)
        mark(cluster, newest, "failed")
    number = newest.number + 1 if newest else 1
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    revision = Revision(deployment, number, "pending", chart, reason, made, tuple(manifests), Holder())
    if cluster.create(to_config_map(revision)) is None:
        there = from_config_map(cluster.get(_ref(revision)) or to_config_map(revision))
        _refuse_while_held(there)
        if there.holder == revision.holder:  # our own, whose answer was lost on the way
            return revision
        raise TransientError(f"{deployment}: revision {number} was made by someone else just now. Look at it, then run it again.")
    return revision


def renew(cluster: Cluster, revision: Revision) -> Revision:
    """The pending revision, held by this process from now on; to be said again while it takes long."""
    cluster.merge(_ref(revision), {"metadata": {"annotations": {HOLDER: Holder().model_dump_json()}}})
    return revision


def mark(cluster: Cluster, revision: Revision, state: State) -> None:
    """Sets a revision's state; nobody holds it after that."""
    cluster.merge(_ref(revision), {"metadata": {"labels": {STATE_LABEL: state}, "annotations": {HOLDER: None}}})


def finish(cluster: Cluster, revision: Revision) -> None:
    """Makes a revision the current one, and forgets the oldest beyond `KEPT`."""
    mark(cluster, revision, "deployed")
    others = [each for each in history(cluster, revision.deployment) if each.number < revision.number]
    for each in others:
        if each.state in ("deployed", "pending"):
            mark(cluster, each, "superseded")
    for each in others[: max(0, len(others) + 1 - KEPT)]:
        cluster.delete(_ref(each))


def forget(cluster: Cluster, deployment: str) -> None:
    """Deletes all revisions of a deployment, and the Secret that was made for it."""
    for kind in ("Secret", "ConfigMap"):
        for live in cluster.find("v1", kind, {OF_LABEL: deployment}):
            cluster.delete(ref_of(live))


def _refuse_while_held(revision: Revision) -> None:
    holder, mine = revision.holder, Holder()
    if holder is not None and not holder.is_gone() and (holder.space, holder.pid) != (mine.space, mine.pid):
        since_s = time.time() - holder.since_s
        raise TransientError(
            f"{revision.deployment}: {holder.by} has been deploying revision {revision.number} for {since_s:.0f} s. "
            "One at a time: wait for it, then run it again."
        )


def _ref(revision: Revision) -> Ref:
    return Ref("v1", "ConfigMap", revision.name)
