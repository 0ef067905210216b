"""The `slipway` command. Imports stay inside the commands: `slipway --help` answers in 0.3 s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import deploy_commands, stage_commands
from pipelines.deploy_commands import Context, Kubeconfig, Namespace, On
from pipelines.options import AsJson, Executor, KeyFile, Model, Overrides, Quiet, SpecPath

app = typer.Typer(
    name="slipway",
    help="One spec and a dataset in; a fine-tuned, quantized, proven, promoted and served LLM out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
keys_app = typer.Typer(help="API keys of served models (`serve.api_keys_file`).", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        print(f"slipway {version('slipway-ml')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """One spec and a dataset in; a fine-tuned, quantized, proven, promoted and served LLM out."""


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why; start nothing.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    serve: Annotated[bool, typer.Option(help="Serve the promoted model and send it one request.")] = True,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Go on serving until Ctrl-C.")] = False,
    executor: Executor = None,
    report_dir: Annotated[Path | None, typer.Option(help="Leave report.json, report.html and comment.md in this folder too.")] = None,
) -> None:
    """Train, merge, quantize, evaluate, prove, gate, promote and serve, as the spec says."""
    from pipelines import commands, comment

    show = {"as_json": json, "quiet": quiet}
    with comment.about(spec.stem, None if dry_run else report_dir):
        commands.run(
            spec,
            overrides or [],
            dry_run=dry_run,
            will_serve=serve,
            keep_serving=keep_serving,
            report_dir=report_dir,
            executor=executor,
            **show,
        )


@app.command()
def train(
    spec: SpecPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what memory and time it would take, from a few steps.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    executor: Executor = None,
) -> None:
    """Train only: from the dataset to the adapter."""
    from pipelines import commands

    commands.train(spec, overrides or [], dry_run=dry_run, as_json=json, quiet=quiet, executor=executor)


stage_commands.add_to(app)
deploy_commands.add_to(app)


@app.command()
def prove(
    model: Annotated[str, typer.Argument(metavar="SPEC", help="The spec file; with --explain also NAME@ALIAS or a folder.")],
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Only tell what the certificate that is there says, in words.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    executor: Executor = None,
) -> None:
    """Prove that what would be served is what was trained: the certificate, stage by stage."""
    from pipelines import commands

    commands.prove(model, overrides or [], explain=explain, as_json=json, quiet=quiet, executor=executor)


@app.command()
def sign(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder.")]) -> None:
    """Sign a model's folder at your word, so that a server takes it; `slipway run` signs what it promotes."""
    from pipelines import commands

    commands.sign(folder)


@app.command()
def serve(model: Model, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Serve a model until Ctrl-C: a spec file's, NAME@ALIAS of the registry, or a model's folder."""
    from pipelines import commands

    commands.serve(model, overrides or [], quiet=quiet)


@app.command()
def batch(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Requests: a file .jsonl or .parquet, or a folder of them.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the answers; one that a stopped run left is completed.")],
    overrides: Overrides = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="jsonl|parquet", help="As --set batch.format; absent: the input's.")
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer files of requests, without a server.

    MODEL is a spec file, NAME@ALIAS or a model's folder. INPUT is JSONL or Parquet, a file or a folder: bodies of chats or completions, or
    OpenAI's batch format. OUTPUT is a folder; the same command completes what a stopped run left in it.
    """
    from pipelines import commands

    formats = [f"batch.format={format}"] if format else []
    commands.batch(model, source, output, [*(overrides or []), *formats], as_json=json, quiet=quiet)


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation until an empty line.")] = None,
    url: Annotated[str, typer.Option(help="Where a model is served.")] = "http://127.0.0.1:8000",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk to a served model."""
    from pipelines import commands

    commands.chat(message, url, system, max_tokens)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Name of a registered model, or with --target of a deployment; absent: --url.")] = None,
    url: Annotated[str, typer.Option(help="Where a model is served.")] = "http://127.0.0.1:8000",
    registered: Annotated[bool, typer.Option("--registered", help="All registered models, in place of a server.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second until Ctrl-C.")] = False,
    target: On = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: AsJson = False,
) -> None:
    """What a running server is doing; with NAME or --registered, registered models with their versions and aliases.

    With --target kubernetes: the objects of the deployment NAME, a spec file's or by its own name, and how they are.
    """
    if target is not None:
        from pipelines.deploy import commands as deploying

        deploying.status(name, deploying.Place(kubeconfig, context, namespace), as_json=json)
    elif name is not None or registered:
        from pipelines import commands

        commands.status(name, as_json=json)
    else:
        from pipelines import status as live_status

        live_status.show(url, as_json=json, watch=watch)


@data_app.command("check")
def data_check(spec: SpecPath, overrides: Overrides = None, json: AsJson = False, quiet: Quiet = False) -> None:
    """Show what training would read: the receipt, and which tokens are learned, in colour."""
    from pipelines import commands

    commands.data_check(spec, overrides or [], as_json=json, quiet=quiet)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Who will use the key.")],
    file: KeyFile = None,
    weight: Annotated[float, typer.Option(help="Share of a busy server beside the other keys.")] = 1.0,
    top_priority: Annotated[int, typer.Option(help="Smallest, so most urgent, priority that its requests may ask for.")] = 0,
    json: AsJson = False,
) -> None:
    """Make a key and print it, this once."""
    from pipelines import keys

    keys.add(name, file, weight, top_priority, as_json=json)


@keys_app.command("list")
def keys_list(file: KeyFile = None, json: AsJson = False) -> None:
    """The keys that are valid, without the keys themselves."""
    from pipelines import keys

    keys.show(file, as_json=json)


@keys_app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Name or id of the key.")], file: KeyFile = None) -> None:
    """Make a key invalid; servers that read the file refuse it within a second."""
    from pipelines import keys

    keys.revoke(name, file)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow UI.")] = 5000) -> None:
    """Open the MLflow UI on this machine's store until Ctrl-C."""
    from pipelines import commands

    commands.ui(port)


@app.command()
def doctor(json: AsJson = False) -> None:
    """Check this machine: packages, cores, memory, disk, ports, store."""
    from pipelines import commands

    commands.doctor(as_json=json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, stack: Annotated[str, typer.Argument(help="train, serve, autoscale, curve or soak")]) -> None:
    """Measure a stack; further options go to `python -m training.bench`, `serving.bench` and so on; see --help there."""
    from pipelines import commands

    commands.bench(stack, context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def plan(context: typer.Context) -> int:
    """Replicas, nodes and cost for --tokens-per-s X with first tokens within --ttft S, from measured curves; see --help there."""
    from pipelines import commands

    return commands.plan(context.args)


def main() -> None:
    """Runs the command line; exits 0 done, 2 bad input, 3 a gate refused, 75 try again, 130 interrupted."""
    import signal

    from infra.errors import EXIT_INTERRUPTED, SlipwayError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an orderly stop, as for Ctrl-C
    try:
        result: Any = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0  # typer gives 130 for Ctrl-C
    except SlipwayError as error:
        print(f"slipway: {error.message}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors carry their own text and exit code
        if usage is None:
            raise
        print(f"slipway: {usage()}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    if code == EXIT_INTERRUPTED:
        print("slipway: interrupted; the same command resumes", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
