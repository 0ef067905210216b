"""The commands of single stages, and of the registry. Imports stay inside the commands, as in cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.deploy_commands import Context, Force, Kubeconfig, Namespace, On, Timeout, Wait
from pipelines.options import AsJson, Executor, Overrides, Quiet, Registered, SpecPath

Reason = Annotated[str | None, typer.Option("--reason", help="Why, for --force; kept with the version, with who and when.")]


def add_to(app: typer.Typer) -> None:
    """Makes each of them a command of `app`."""
    for command in (merge, quantize, evaluate, promote, rollback):
        app.command()(command)


def merge(spec: SpecPath, overrides: Overrides = None, json: AsJson = False, quiet: Quiet = False, executor: Executor = None) -> None:
    """From the dataset to the merged 16-bit model; what is there already is not made again."""
    from pipelines import stages

    stages.show("merge", spec, overrides or [], as_json=json, quiet=quiet, executor=executor)


def quantize(spec: SpecPath, overrides: Overrides = None, json: AsJson = False, quiet: Quiet = False, executor: Executor = None) -> None:
    """From the dataset to the model in the weight formats that the spec asks for."""
    from pipelines import stages

    stages.show("quantize", spec, overrides or [], as_json=json, quiet=quiet, executor=executor)


def evaluate(spec: SpecPath, overrides: Overrides = None, json: AsJson = False, quiet: Quiet = False, executor: Executor = None) -> None:
    """From the dataset to the scores of every model; nothing is registered."""
    from pipelines import stages

    stages.show("evaluate", spec, overrides or [], as_json=json, quiet=quiet, executor=executor)


def promote(
    model: Registered,
    version: Annotated[str | None, typer.Argument(help="Number of the version; absent: the challenger.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where a gate refused it or its certificate does not hold.")] = False,
    reason: Reason = None,
    json: AsJson = False,
) -> None:
    """Make a version champion if its gates passed and its certificate holds; the old champion becomes `previous`."""
    from pipelines import registry_commands

    registry_commands.promote(model, version, force=force, reason=reason, as_json=json)


def rollback(
    model: Registered,
    target: On = None,
    to: Annotated[int | None, typer.Option("--to", help="Revision to go back to; absent: the last good one before.")] = None,
    wait: Wait = True,
    timeout: Timeout = 900.0,
    force: Force = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: AsJson = False,
) -> None:
    """Make `previous` champion again; what was champion becomes `previous`.

    With --target kubernetes: bring a deployment back to an earlier revision; the registry stays as it is.
    """
    if target is not None:
        from pipelines.deploy import commands

        place = commands.Place(kubeconfig, context, namespace)
        commands.rollback(model, place, to, timeout if wait else None, force, as_json=json)
        return
    from pipelines import registry_commands

    registry_commands.rollback(model, as_json=json)
