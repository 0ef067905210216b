"""What each command does; `cli.py` only names arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra import registry, tracking
from infra.errors import ConfigError, GateFailed, SlipwayError
from infra.files import read_json
from infra.network import require_free_port
from infra.process import disk_full_as_known_error
from infra.provenance import capture
from infra.settings import child_environment, load_settings
from pipelines import batches, checkup, graph, pipeline, preflight, proving, runner, sealing, serveable, training
from pipelines import serve as serving_client
from pipelines.display import Display, estimate_table, plan_table
from pipelines.plan import build_steps
from pipelines.report import RECEIPT_NAME
from pipelines.spec import load_spec
from pipelines.target import find_target

PREVIEW_NAME = "preview.json"


def run(
    path: Path,
    overrides: list[str],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    will_serve: bool,
    keep_serving: bool,
    executor: str | None = None,
    report_dir: Path | None = None,
) -> None:
    """`slipway run`."""
    settings, spec = load_settings(executor), load_spec(path, overrides)
    if dry_run:
        serveable.check_source(spec)
        _show_plan(runner.plan(settings, build_steps(spec)), as_json)
        return
    with disk_full_as_known_error():
        result = pipeline.run(spec, settings, Display(quiet), will_serve, keep_serving, report_dir)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))


def train(path: Path, overrides: list[str], dry_run: bool, as_json: bool, quiet: bool, executor: str | None = None) -> None:
    """`slipway train`."""
    settings, spec, display = load_settings(executor), load_spec(path, overrides), Display(quiet)
    with disk_full_as_known_error():
        result = training.estimate(spec, settings, display) if dry_run else training.train(spec, settings, display)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    if dry_run:
        console.print(estimate_table(result))
    else:
        console.print(f"\nheld-out loss {result['training']['final_heldout_loss']}\n{result['path']}", soft_wrap=True)


def prove(named: str, overrides: list[str], explain: bool, as_json: bool, quiet: bool, executor: str | None = None) -> None:
    """`slipway prove SPEC`, or with `--explain` what is said of a spec file, NAME@ALIAS or folder already."""
    settings = load_settings(executor)
    if explain:
        certificate, signature = proving.find_certificate(named, overrides, settings)
    else:
        with disk_full_as_known_error():
            certificate, signature = proving.prove(load_spec(Path(named), overrides), settings, Display(quiet)), "made when it is promoted"
    if as_json:
        print(json.dumps({**certificate, "signature": signature}, ensure_ascii=False))
    else:
        Console().print(proving.explain(certificate, signature), soft_wrap=True)
    refused = [check["name"] + " of " + check["stage"] for check in certificate.get("checks", ()) if not check["passed"]]
    if refused and not explain:
        raise GateFailed(f"the certificate is refused, {len(refused)} check(s) failed: {', '.join(refused)}.")


def sign(folder: Path) -> None:
    """`slipway sign FOLDER`."""
    settings = load_settings()
    made = sealing.seal_by_hand(settings, folder)
    Console(stderr=True).print(f"{folder} is signed by {made.key_id[:16]} ({settings.signing_key_file})", soft_wrap=True)


def serve(name: str, overrides: list[str], quiet: bool) -> None:
    """`slipway serve SPEC | NAME@ALIAS | FOLDER`."""
    settings, display = load_settings(), Display(quiet)
    target = find_target(name, overrides, settings)
    with serving_client.serving(settings, target.model_dir, target.name, target.serve) as served:
        display.note(target.label)
        pipeline.wait(served, display)


def batch(name: str, source: Path, output_dir: Path, overrides: list[str], as_json: bool, quiet: bool) -> None:
    """`slipway batch MODEL INPUT OUTPUT`."""
    settings, display = load_settings(), Display(quiet)
    target = find_target(name, overrides, settings)
    display.note(target.label)
    with disk_full_as_known_error():
        result = batches.answer(target, source, output_dir, settings, display)
    if as_json:
        print(json.dumps(result))
        return
    tokens = f"{result['prompt_tokens']} prompt and {result['completion_tokens']} new tokens"
    Console().print(f"{result['rows']} rows, {result['errors']} of them errors, {tokens}\n{output_dir.absolute()}", soft_wrap=True)


def chat(message: str | None, url: str, system: str | None, max_tokens: int) -> None:
    """`slipway chat`: one message, or a conversation until an empty line."""
    api_key = load_settings().api_key
    model = serving_client.model_names(url, api_key)[0]
    messages = [{"role": "system", "content": system}] if system else []
    while text := message or (input("> ") if sys.stdin.isatty() else sys.stdin.readline().strip()):
        messages.append({"role": "user", "content": text})
        answer = ""
        for piece in serving_client.stream_chat(url, {"model": model, "messages": messages, "max_tokens": max_tokens}, api_key):
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})
        if message:
            return


def status(name: str | None, as_json: bool) -> None:
    """`slipway status`."""
    versions = registry.all_versions(tracking.client(load_settings().tracking_uri), name)
    if as_json:
        print(json.dumps({"versions": [asdict(version) | _place(version) for version in versions]}))
        return
    table = Table("model", "version", "aliases", "artifact", box=None, pad_edge=False)
    for version in versions:
        table.add_row(version.name, version.version, " ".join(f"@{alias}" for alias in version.aliases), version.digest[:16])
    Console().print(table if versions else "No model is registered yet: `slipway run SPEC` registers one.")


def data_check(path: Path, overrides: list[str], as_json: bool, quiet: bool) -> None:
    """`slipway data check`: runs the steps up to render and shows what they found."""
    settings, spec = load_settings(), load_spec(path, overrides)
    steps = graph.upto(build_steps(spec), "render")
    preflight.check(spec, runner.plan(settings, steps), settings, will_serve=False)
    outcome = runner.run(settings, steps, settings.runs_dir / "data-check", capture(spec.fingerprint), None, Display(quiet))
    folder = outcome.artifacts["render"].path
    receipt = read_json(folder / RECEIPT_NAME)
    if as_json:
        print(json.dumps(receipt))
        return
    console = Console()
    console.print_json(json.dumps(receipt))
    console.print("\nlearned tokens in green, prompt dim:\n")
    for row in read_json(folder / PREVIEW_NAME):
        console.print(Text.assemble(*((piece, "bold green" if supervised else "dim") for piece, supervised in row)))


def ui(port: int) -> None:
    """`slipway ui`."""
    settings = load_settings()
    require_free_port("127.0.0.1", port, "--port ")
    root = settings.run_files_root
    if root is None:
        print(f"the MLflow UI of this store is {settings.tracking_uri}")
        return
    settings.home.mkdir(parents=True, exist_ok=True)
    artifacts = root.as_uri() if isinstance(root, Path) else root
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", settings.tracking_uri, "--default-artifact-root", artifacts]
    print(f"MLflow UI at http://127.0.0.1:{port} (Ctrl-C stops it)", file=sys.stderr)
    code = subprocess.run(command, env=child_environment("mlflow"), check=False).returncode
    if code:
        raise SlipwayError(f"`mlflow server` ended with exit code {code}; its own message is above.")


def doctor(as_json: bool) -> None:
    """`slipway doctor`: exits 2 when something that a run needs is missing."""
    checks = checkup.inspect(load_settings())
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        table = Table("check", "", "found", box=None, pad_edge=False)
        for check in checks:
            table.add_row(check.name, "[green]ok[/green]" if check.passed else "[red]missing[/red]", check.found)
        Console().print(table)
    missing = [check.name for check in checks if not check.passed]
    if missing:
        raise ConfigError(f"{len(missing)} check(s) failed: {', '.join(missing)}. The table says what was found and what to install.")


def bench(stack: str, arguments: list[str]) -> None:
    """`slipway bench train|serve|autoscale|curve|soak`: the stack's own benchmark, as a program."""
    modules = {
        "train": "training.bench",
        "serve": "serving.bench",
        "autoscale": "serving.autoscaling.bench",
        "curve": "serving.capacity.measure",
        "soak": "serving.soak",
    }
    if stack not in modules:
        raise ConfigError(f"bench {stack!r}: there are `slipway bench {'`, `slipway bench '.join(modules)}`.")
    module = modules[stack]
    code = subprocess.run([sys.executable, "-m", module, *arguments], env=child_environment(module), check=False).returncode
    if code:
        raise SlipwayError(f"{module} ended with exit code {code}; its own message is above.")


def plan(arguments: list[str]) -> int:
    """`slipway plan`: the serving stack's own program; its exit code."""
    module = "serving.capacity.plan"
    return subprocess.run([sys.executable, "-m", module, *arguments], env=child_environment(module), check=False).returncode


def _place(version: registry.RegisteredVersion) -> dict[str, str | None]:
    return {"folder": str(version.folder) if version.is_local else None}


def _show_plan(planned: list[runner.Planned], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"steps": [{"step": item.step.label, "will_run": item.will_run, "reason": item.reason} for item in planned]}))
    else:
        Console().print(plan_table(planned))
