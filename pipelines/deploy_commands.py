"""The commands of a cluster. Imports stay inside the commands, as in cli.py."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import AsJson, Overrides, SpecPath


class Target(StrEnum):
    """Where something is deployed."""

    kubernetes = "kubernetes"


class ChartName(StrEnum):
    """The charts in helm/."""

    serving = "serving"
    training = "training"
    tracking = "tracking"


class DryRun(StrEnum):
    """How far a trial goes: without a cluster, or asking it."""

    client = "client"
    server = "server"


Deployed = Annotated[str, typer.Argument(metavar="SPEC|NAME", help="A spec file, or the name of what was deployed.")]
On = Annotated[Target | None, typer.Option("--target", help="Of what is deployed there, in place of the registry or a server.")]
Cluster = Annotated[Target, typer.Option("--target", help="Where.")]
Kubeconfig = Annotated[Path | None, typer.Option("--kubeconfig", help="File that describes the cluster; absent: as kubectl finds it.")]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; absent: the current one.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Absent: the context's.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until all of it serves.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="How long to wait for that, in seconds.")]
Force = Annotated[bool, typer.Option("--force", help="Take over fields that someone else manages.")]


def add_to(app: typer.Typer) -> None:
    """Makes each of them a command of `app`."""
    for command in (deploy, logs, destroy):
        app.command()(command)


def deploy(
    spec: SpecPath,
    overrides: Overrides = None,
    target: Cluster = Target.kubernetes,
    chart: Annotated[ChartName, typer.Option("--chart", help="What of it: the served model, its pipeline, or the MLflow server.")] = (
        ChartName.serving
    ),
    name: Annotated[str | None, typer.Option("--name", help="Of the deployment; absent: the spec's, with the chart's behind it.")] = None,
    model: Annotated[str, typer.Option("--model", metavar="ALIAS|VERSION", help="Which registered version is served.")] = "champion",
    profile: Annotated[str | None, typer.Option("--profile", help="Values that come with the chart: laptop, cpu, gpu, production.")] = None,
    values: Annotated[list[Path] | None, typer.Option("--values", "-f", help="A values file, over all else; may be repeated.")] = None,
    render: Annotated[Path | None, typer.Option("--render", metavar="DIR", help="Only write the manifests there, for GitOps.")] = None,
    dry_run: Annotated[
        DryRun | None, typer.Option("--dry-run", help="`client` renders, `server` asks the cluster; nothing changes.")
    ] = None,
    wait: Wait = True,
    timeout: Timeout = 900.0,
    force: Force = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: AsJson = False,
) -> None:
    """Bring a spec's chart onto a cluster: apply what is wanted, delete what is no longer, and keep a revision to go back to."""
    from pipelines.deploy import commands

    wanted = commands.Wanted(spec, overrides or [], chart.value, name, model, profile, values or [])
    place = commands.Place(kubeconfig, context, namespace)
    trial = dry_run.value if dry_run else None
    commands.deploy(wanted, place, render, trial, timeout if wait else None, force, as_json=json)


def logs(
    name: Deployed,
    target: Cluster = Target.kubernetes,
    component: Annotated[str | None, typer.Option("--component", help="Only pods of it, such as gateway or ray-worker.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="From the start and as they are printed, until Ctrl-C.")] = False,
    tail: Annotated[int, typer.Option("--tail", min=1, help="Last lines of each container, without --follow.")] = 100,
    previous: Annotated[bool, typer.Option("--previous", help="Of the run before the container's last restart.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """What the pods of a deployment print."""
    from pipelines.deploy import commands

    commands.logs(name, commands.Place(kubeconfig, context, namespace), component, follow, tail, previous)


def destroy(
    name: Deployed,
    target: Cluster = Target.kubernetes,
    with_data: Annotated[bool, typer.Option("--with-data", help="The volumes with their data too.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: AsJson = False,
) -> None:
    """Delete all that was deployed under a name, runs that are under way too; volumes stay unless --with-data."""
    from pipelines.deploy import commands

    commands.destroy(name, commands.Place(kubeconfig, context, namespace), with_data, as_json=json)
