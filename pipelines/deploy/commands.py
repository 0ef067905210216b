"""What `slipway deploy`, `destroy`, and `status`, `logs` and `rollback` with a target do."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.errors import ConfigError
from infra.settings import load_settings
from pipelines.charts import Chart
from pipelines.cluster import capabilities, inventory, readiness, revisions, rollout
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import ref_of
from pipelines.cluster.rollout import Change
from pipelines.deploy import log_view, preflight, rendering
from pipelines.deploy.values import chart_values, given_values
from pipelines.spec import load_spec
from pipelines.target import SPEC_SUFFIXES

RAY_JOB = ("ray.io/v1", "RayJob")
TOKEN_BYTES = 32


@dataclass(frozen=True)
class Place:
    """Which cluster, and where in it."""

    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str | None = None

    def connect(self) -> Cluster:
        """A connection; nothing is asked yet."""
        return connect(self.kubeconfig, self.context, self.namespace)


@dataclass(frozen=True)
class Wanted:
    """What is to be deployed."""

    spec: Path
    overrides: list[str]
    chart: Chart
    name: str | None
    model: str
    profile: str | None
    values: Sequence[Path]


def deployment_name(spec_or_name: str | Path, chart: Chart = "serving") -> str:
    """The name of a spec's deployment where none is given: the spec's, with the chart's behind it where that is not `serving`."""
    text = str(spec_or_name)
    if Path(text).suffix not in SPEC_SUFFIXES:
        return text
    name = load_spec(Path(text), []).name.replace(".", "-").replace("_", "-")
    return name if chart == "serving" else f"{name}-{chart}"


def deploy(
    wanted: Wanted, place: Place, render_dir: Path | None, dry_run: str | None, wait_s: float | None, force: bool, as_json: bool
) -> None:
    """`slipway deploy`: renders, and then writes files, tries, or applies and waits."""
    console = Console(stderr=True, highlight=False)
    settings = load_settings()
    preflight.check(wanted.chart, wanted.spec, wanted.overrides, wanted.values, wanted.profile, settings)
    name = wanted.name or deployment_name(wanted.spec, wanted.chart)
    given, is_trial = given_values(wanted.values), dry_run is not None and render_dir is None
    values = chart_values(wanted.chart, wanted.spec, wanted.overrides, given, name, wanted.model, settings, is_trial)
    if render_dir is not None or dry_run == "client":
        namespace = place.namespace or "default"
        manifests = rendering.render(wanted.chart, values, name, namespace, wanted.profile)
        _show_rendered(manifests, namespace, render_dir, as_json)
        return
    cluster = place.connect()
    version, apis = capabilities.kube_version(cluster), capabilities.api_versions(cluster)
    manifests = rendering.render(wanted.chart, values, name, cluster.namespace, wanted.profile, version, apis)
    if dry_run == "server":
        _show_changes(name, None, rollout.preview(cluster, name, manifests, force), as_json)
        return
    _require_free_name(cluster, name, wanted.chart)
    if wanted.chart == "serving":
        _ensure_token(cluster, name, values)
    revision, changes = rollout.roll_out(cluster, name, wanted.chart, manifests, f"deploy of {wanted.spec.name}", _noter(console), force)
    _finish(cluster, revision, changes, wait_s, as_json, console)


def rollback(name: str, place: Place, number: int | None, wait_s: float | None, force: bool, as_json: bool) -> None:
    """`slipway rollback NAME --target kubernetes`."""
    console, cluster = Console(stderr=True, highlight=False), place.connect()
    revision, changes = rollout.roll_back(cluster, deployment_name(name), number, _noter(console), force)
    _finish(cluster, revision, changes, wait_s, as_json, console)


def destroy(name: str, place: Place, with_data: bool, as_json: bool) -> None:
    """`slipway destroy NAME`."""
    console, cluster = Console(stderr=True, highlight=False), place.connect()
    deployment = deployment_name(name)
    changes = rollout.destroy(cluster, deployment, with_data, _noter(console), more=(RAY_JOB,))
    kept = [change for change in changes if change.fate == "kept"]
    _show_changes(deployment, None, changes, as_json)
    if kept and not as_json:
        console.print(f"{len(kept)} volume(s) were kept with their data; --with-data deletes them too", soft_wrap=True)


def logs(name: str, place: Place, component: str | None, follow: bool, num_lines: int, previous: bool) -> None:
    """`slipway logs NAME`."""
    cluster, deployment = place.connect(), deployment_name(name)
    lines = (
        log_view.followed(cluster, deployment, component)
        if follow
        else log_view.recent(cluster, deployment, component, num_lines, previous)
    )
    for line in lines:
        print(line, flush=follow)


def status(name: str | None, place: Place, as_json: bool) -> None:
    """`slipway status NAME --target kubernetes`. Raises ConfigError where nothing of that name is deployed."""
    if name is None:
        raise ConfigError("status --target kubernetes: the name of a deployment, or its spec file, is needed.")
    cluster, deployment = place.connect(), deployment_name(name)
    past = revisions.history(cluster, deployment)
    rows = readiness.overview(cluster, inventory.members(cluster, deployment, past, more=(RAY_JOB,)), deployment)
    if not past and not rows:
        raise ConfigError(f"{deployment}: nothing of that name is deployed in namespace {cluster.namespace}. Look at --namespace.")
    if as_json:
        objects = [{"kind": ref.kind, "name": ref.name, "phase": found.phase, "text": found.text} for ref, found in rows]
        kept = [{"number": each.number, "state": each.state, "made": each.made, "reason": each.reason} for each in past]
        print(json.dumps({"deployment": deployment, "namespace": cluster.namespace, "revisions": kept, "objects": objects}))
        return
    console = Console(highlight=False)
    for each in past[-5:]:
        console.print(f"revision {each.number:<4} {each.state:<11} {each.made}  {each.reason}", soft_wrap=True)
    table = Table("object", "", "state", box=None, pad_edge=False)
    colours = {"done": "green", "failed": "red", "troubled": "yellow"}
    for ref, found in rows:
        colour = colours.get(found.phase, "cyan")
        table.add_row(f"{ref.kind} {ref.name}", f"[{colour}]{found.phase}[/{colour}]", found.text)
    console.print(table)


def _finish(
    cluster: Cluster, revision: revisions.Revision, changes: Sequence[Change], wait_s: float | None, as_json: bool, console: Console
) -> None:
    if wait_s is not None:
        readiness.wait_ready(cluster, revision.deployment, revision.manifests, wait_s, _noter(console))
    _show_changes(revision.deployment, revision.number, changes, as_json)


def _show_changes(deployment: str, number: int | None, changes: Sequence[Change], as_json: bool) -> None:
    if as_json:
        rows = [{"kind": each.ref.kind, "name": each.ref.name, "change": each.fate} for each in changes]
        print(json.dumps({"deployment": deployment, "revision": number, "changes": rows}))
        return
    counted = {fate: sum(each.fate == fate for each in changes) for fate in dict.fromkeys(each.fate for each in changes)}
    said = ", ".join(f"{count} {fate}" for fate, count in counted.items())
    print(f"{deployment}{'' if number is None else f' revision {number}'}: {said}")


def _show_rendered(manifests: Sequence[dict[str, Any]], namespace: str, folder: Path | None, as_json: bool) -> None:
    if folder is not None:
        written = rendering.write_manifests(manifests, namespace, folder)
        print(json.dumps({"files": [str(path) for path in written]}) if as_json else f"{len(written)} files in {folder}")
    elif as_json:
        print(json.dumps({"manifests": list(manifests)}))
    else:
        for manifest in manifests:
            print(ref_of(manifest))


def _require_free_name(cluster: Cluster, name: str, chart: Chart) -> None:
    """A deployment is of one chart: the objects of another one's would be pruned."""
    past = revisions.history(cluster, name)
    if past and past[-1].chart != chart:
        raise ConfigError(f"{name}: that name is of a deployment of the chart {past[-1].chart}. Take another by --name.")


def _ensure_token(cluster: Cluster, name: str, values: dict[str, Any]) -> None:
    """Makes the Secret by which gateways and replicas know each other, unless it is there; it goes with the deployment."""
    wanted = values["gateway"]["tokenSecret"]
    if wanted["name"] != f"{name}-front":  # someone's own
        return
    token = base64.b64encode(secrets.token_hex(TOKEN_BYTES).encode()).decode()
    labels = {"app.kubernetes.io/part-of": "slipway", "app.kubernetes.io/managed-by": "slipway", revisions.OF_LABEL: name}
    metadata = {"name": wanted["name"], "labels": labels}
    cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": {wanted["key"]: token}})


def _noter(console: Console) -> rollout.Note:
    return lambda text: console.print(text, soft_wrap=True)
