"""A program that is started ahead of its job: what it needs is prepared while the driver still opens MLflow."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import TransientError
from infra.process import Job
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines import runner
from pipelines.display import Display
from pipelines.step import Step, StepContext
from tests.conftest import wait_for

PROGRAM = """
import contextlib
from infra.contracts import write_manifest
from infra.errors import TransientError
from infra.process import Job, run_program

@contextlib.contextmanager
def prepared(draft: Job):
    (draft.output_dir.parents[2] / "prepared").write_text(draft.provenance.mlflow_run_id or "no run yet")
    yield
    (draft.output_dir.parents[2] / "ended").touch()

def main(job: Job) -> None:
    (job.output_dir / "text").write_text(job.provenance.mlflow_run_id)
    write_manifest(job.output_dir, "dataset", job.provenance)

run_program(Job, main, prepared=prepared)
"""


class Nothing(Config):
    """Nothing to say."""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "program_under_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")


def write_rows(config: Nothing, context: StepContext) -> None:
    write_manifest(context.output_dir, "tokens", context.provenance)


def start_program(config: Nothing, context: StepContext) -> None:
    context.run_program("program_under_test", context.job(Job))


def steps() -> list[Step]:
    return [
        Step("rows", 1, "tokens", Nothing(), write_rows),
        Step("train", 1, "dataset", Nothing(), start_program, needs={"rows": "tokens"}),
    ]


def run(settings: Settings, wanted: list[Step], ahead: runner.Ahead) -> runner.Outcome:
    made_by = Provenance(mlflow_run_id="made-later")
    return runner.run(settings, wanted, settings.home / "run", made_by, None, Display(quiet=True), ahead)


def test_program_started_ahead_prepares_with_the_draft_and_works_on_the_job(settings: Settings) -> None:
    run(settings, steps()[:1], {})
    with runner.started_ahead(settings, runner.plan(settings, steps()), settings.home / "run") as ahead:
        wait_for(settings.home / "prepared")
        outcome = run(settings, steps(), ahead)
    assert (settings.home / "prepared").read_text() == "no run yet"
    assert (outcome.artifacts["train"].path / "text").read_text() == "made-later"
    assert (settings.home / "ended").exists()


def test_program_started_ahead_whose_job_never_comes_is_stopped(settings: Settings) -> None:
    run(settings, steps()[:1], {})
    planned = runner.plan(settings, steps())
    with contextlib.suppress(TransientError), runner.started_ahead(settings, planned, settings.home / "run") as ahead:
        wait_for(settings.home / "prepared")
        pid = ahead["train"].process.pid
        raise TransientError("the MLflow store gives no answer")
    assert not psutil.pid_exists(pid)


def test_started_ahead_starts_nothing_before_its_inputs_are_made_or_once_it_is_made(settings: Settings) -> None:
    with runner.started_ahead(settings, runner.plan(settings, steps()), settings.home / "run") as ahead:
        assert ahead == {}
    run(settings, steps(), {})
    with runner.started_ahead(settings, runner.plan(settings, steps()), settings.home / "run") as ahead:
        assert ahead == {}
