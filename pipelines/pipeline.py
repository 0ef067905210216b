"""The main job: spec and dataset in, promoted and served model out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra import metric_stream, provenance, registry, tracking
from infra.errors import GateFailed, SlipwayError, TransientError
from infra.files import write_json_atomic
from infra.settings import Settings
from pipelines import plots, preflight, promotion, registration, report, runner, sealing
from pipelines.display import Display, candidate_table, gate_table, score_table
from pipelines.plan import build_steps
from pipelines.run_record import RunRecords
from pipelines.runner import Outcome, Tracked
from pipelines.serve import Served, chat, sample_messages, serving
from pipelines.spec import Spec
from pipelines.steps.choose import candidate_columns, chosen

log = logging.getLogger(__name__)


def run(
    spec: Spec, settings: Settings, display: Display, will_serve: bool = True, keep_serving: bool = False, report_dir: Path | None = None
) -> dict[str, Any]:
    """Runs all of it and returns the report, which also lies in the run's folder, in its MLflow run and, where given, in `report_dir`.

    Raises ConfigError before anything starts on bad input; GateFailed, with the report written, when a gate refuses the model.
    """
    steps = build_steps(spec)
    preflight.check(spec, runner.plan(settings, steps), settings, will_serve)
    run_dir = make_run_dir(spec, settings)
    with tracked_run(spec, settings, run_dir) as tracked:
        display.note(f"[bold]{spec.name}[/bold]  run {tracked.run_id}  in {run_dir}")
        made_by = provenance.capture(spec.fingerprint, tracked.run_id)
        outcome = runner.run(settings, steps, run_dir, made_by, tracked, display)
        runner.bring_whole(settings, chosen(outcome.artifacts))
        rows = outcome.artifacts["rows"]
        tracking.log_dataset(tracked.client, tracked.run_id, f"{spec.name}-rows", rows.manifest.digest, rows.path)
        if registration.has_passed(outcome):  # before it is registered, so that the signature goes wherever the model goes
            said = {"gates": "passed", "run_id": tracked.run_id}
            sealing.seal_promoted(settings, spec.name, chosen(outcome.artifacts), outcome.artifacts["prove"], outcome.artifacts, said)
        version = registration.register(spec, outcome, tracked, settings)
        result = report.build(spec, tracked.run_id, outcome, version, None)
        _record(result, outcome, tracked)
        registration.describe(spec, outcome, version, result, tracked, run_dir)
        _record_report(result, tracked, run_dir, report_dir)
        _show_figures(result, display)
        version = _promote(version, tracked, run_dir)
        result["model"]["aliases"] = sorted(version.aliases)
        _record_report(result, tracked, run_dir, report_dir)
        display.note(f"\n{version.name} version {version.version} is @{registry.CHAMPION}")
        if will_serve:
            with serving(settings, chosen(outcome.artifacts).path, spec.name, spec.serve) as served:
                result["serving"] = ask_sample(served, outcome.artifacts["rows"].path, settings, display)
                _record_report(result, tracked, run_dir, report_dir)
                _say_where(settings, run_dir, display)
                if keep_serving:
                    wait(served, display)
        else:
            _say_where(settings, run_dir, display)
    return result


def _show_figures(result: dict[str, Any], display: Display) -> None:
    display.note("")
    display.console.print(score_table(result["scores"]))
    display.note("")
    _show_candidates(result["candidates"], display)
    display.console.print(gate_table(result["gates"]))


def make_run_dir(spec: Spec, settings: Settings) -> Path:
    """A folder for one command's logs and reports, with the resolved spec in it; the same one where an earlier driver was cut off."""
    begun = RunRecords(settings, spec.fingerprint).read()
    folder = settings.runs_dir / (begun.run_name if begun else f"{time.strftime('%Y%m%d-%H%M%S')}-{spec.name}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "spec.json", spec.model_dump(mode="json"))
    return folder


@contextlib.contextmanager
def tracked_run(spec: Spec, settings: Settings, run_dir: Path) -> Iterator[Tracked]:
    """The MLflow run of this job, ended with the state the job ends in; the same one where an earlier driver was cut off."""
    client = tracking.client(settings.tracking_uri)
    settings.home.mkdir(parents=True, exist_ok=True)
    experiment_id = tracking.ensure_experiment(client, spec.experiment, settings.run_files_root)
    metric_stream.send_left(settings.runs_dir, settings.tracking_uri)
    records = RunRecords(settings, spec.fingerprint)
    begun, tags = records.read(), {"slipway.spec_fingerprint": spec.fingerprint}
    records.announce(run_dir)
    found = (begun.run_id or tracking.find_run(client, experiment_id, run_dir.name, tags)) if begun else None
    with tracking.run(client, experiment_id, run_dir.name, tags=tags, begun_run_id=found) as run_id:
        records.begin(run_id, run_dir)
        tracking.log_params(client, run_id, spec.model_dump(mode="json"))
        client.log_artifact(run_id, str(run_dir / "spec.json"))
        with _ended(records):
            yield Tracked(client, settings.tracking_uri, experiment_id, run_id, records)
        if metric_stream.send_left(settings.runs_dir, settings.tracking_uri):
            log.warning("figures of this run wait in %s; the next run sends them", run_dir / "unsent")


@contextlib.contextmanager
def _ended(records: RunRecords) -> Iterator[None]:
    """Forgets the runs when the block ends, but where the same command goes on with it: interrupted, or an error that may pass."""
    try:
        yield
    except TransientError:
        raise
    except SlipwayError:
        records.end()
        raise
    records.end()


def ask_sample(served: Served, rows_dir: Path, settings: Settings, display: Display) -> dict[str, Any]:
    """Sends the first held-out row to the server and shows the answer."""
    with (rows_dir / "heldout.jsonl").open(encoding="utf-8") as stream:
        messages = sample_messages([next(stream)])
    request = {"model": served.model_name, "messages": messages, "temperature": 0, "max_tokens": 64}
    response = chat(served.url, request, settings.api_key)
    display.note(f"\nPOST {served.url}/v1/chat/completions")
    display.note(f"  user       {messages[-1]['content']}")
    display.note(f"  assistant  {response['choices'][0]['message']['content']}")
    return {"url": served.url, "sample_request": request, "sample_response": response}


def wait(served: Served, display: Display) -> None:
    """Blocks until the server ends or Ctrl-C, which is the way to stop it and not an error."""
    display.note(f"\nserving {served.model_name} at {served.url} (log {served.log_file}); Ctrl-C stops it")
    with contextlib.suppress(KeyboardInterrupt):
        while served.is_running():
            time.sleep(0.5)


def _promote(version: registry.RegisteredVersion, tracked: Tracked, run_dir: Path) -> registry.RegisteredVersion:
    if refused := promotion.objections(version):
        raise GateFailed(
            f"{version.name} version {version.version} was not promoted, {len(refused)} gate(s) refused it:\n  "
            + "\n  ".join(refused)
            + f"\nIt stays registered as @{registry.CHALLENGER}; the report is {run_dir / report.REPORT_NAME}."
        )
    return promotion.promote(tracked.client, version.name, version.version)


def _record_report(result: dict[str, Any], tracked: Tracked, run_dir: Path, report_dir: Path | None) -> None:
    """Writes the report and shows it in MLflow; done again when serving has answered."""
    if report_dir is not None:
        report.write(result, report_dir)
    for path in report.write(result, run_dir):
        tracked.client.log_artifact(tracked.run_id, str(path))


def _record(result: dict[str, Any], outcome: Outcome, tracked: Tracked) -> None:
    for path in report.files(outcome):
        tracked.client.log_artifact(tracked.run_id, str(path))
    tracking.log_metrics(tracked.client, tracked.run_id, report.logged_metrics(result["scores"], result["timings_s"]))
    for name, figure in plots.draw(result).items():
        tracked.client.log_figure(tracked.run_id, figure, name)
    tracked.client.log_table(tracked.run_id, candidate_columns(result["candidates"]), "candidates_table.json")
    trained = outcome.artifacts["train"]
    reference = {"kind": trained.manifest.kind, "path": str(trained.path), "digest": trained.manifest.digest}
    tracked.client.log_dict(tracked.run_id, reference, f"{trained.manifest.kind}.json")  # by reference: it may be large


def _show_candidates(choice: dict[str, Any], display: Display) -> None:
    """The candidates and what they cost, where there is more than one."""
    if len(choice["candidates"]) > 1:
        display.console.print(candidate_table(choice))
        display.note(f"{choice['comparison']}\n" if choice["comparison"] else "")


def _say_where(settings: Settings, run_dir: Path, display: Display) -> None:
    display.note(f"\nreport     {run_dir / report.PAGE_NAME}")
    display.note("MLflow UI  slipway ui   (runs, scores, receipt, certificate, registry)")
