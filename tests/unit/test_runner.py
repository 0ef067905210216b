"""The runner on real files with small steps of our own; the stacks' programs are run by the integration tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import orders
from infra.artifact_store import open_store
from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import ArtifactError, ConfigError, SlipwayError, TransientError
from infra.process import Job
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines import runner
from pipelines.display import Display
from pipelines.executors import local
from pipelines.step import Artifact, Step, StepContext
from tests.conftest import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


class Text(Config):
    """A step that writes a text."""

    text: str


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", tracking_uri="sqlite:///unused")


def write_text(config: Text, context: StepContext) -> None:
    read = "".join((artifact.path / "text").read_text() for artifact in context.inputs.values())
    (context.output_dir / "text").write_text(read + config.text)
    write_manifest(context.output_dir, "dataset", context.provenance)


def chain(first: str = "a", second: str = "b", run_second: Any = write_text) -> list[Step]:
    return [
        Step("first", 1, "dataset", Text(text=first), write_text),
        Step("second", 1, "dataset", Text(text=second), run_second, needs={"first": "dataset"}),
    ]


def run(settings: Settings, steps: list[Step]) -> runner.Outcome:
    return runner.run(settings, steps, settings.home / "run", Provenance(), None, Display(quiet=True))


def test_run_gives_each_step_its_inputs(settings: Settings) -> None:
    outcome = run(settings, chain())
    assert (outcome.artifacts["second"].path / "text").read_text() == "ab"
    assert outcome.skipped == []


def test_artifact_that_a_later_step_could_not_use_stops_the_run_now_and_at_every_later_plan(settings: Settings) -> None:
    def check(made: Artifact, inputs: Mapping[str, Artifact]) -> None:
        if (made.path / "text").read_text() == "ab":
            raise ConfigError(f"{sorted(inputs)} do not do")

    steps = chain()
    steps = [steps[0], replace(steps[1], check=check), Step("third", 1, "dataset", Text(text="c"), write_text, needs={"second": "dataset"})]
    for attempt in range(2):  # just made, and found
        with pytest.raises(ConfigError, match=r"\['first'\] do not do"):
            run(settings, steps)
        assert not any(path.name.startswith("third") for path in settings.home.rglob("*")), attempt
    with pytest.raises(ConfigError, match=r"\['first'\] do not do"):
        runner.plan(settings, steps)


def test_second_run_skips_every_step(settings: Settings) -> None:
    first, second = run(settings, chain()), run(settings, chain())
    assert second.skipped == ["first", "second"]
    assert second.artifacts["second"].path == first.artifacts["second"].path


def test_run_here_goes_on_from_what_a_driver_left_in_the_store_and_fetches_it_whole(settings: Settings, tmp_path: Path) -> None:
    """A driver of programs elsewhere keeps no weights; those that run here read them."""

    def write_weights(config: Text, context: StepContext) -> None:
        (context.output_dir / "w.safetensors").write_text(config.text)
        write_manifest(context.output_dir, "dataset", context.provenance)

    def read_weights(config: Text, context: StepContext) -> None:
        (context.output_dir / "text").write_text((context.inputs["first"].path / "w.safetensors").read_text() + config.text)
        write_manifest(context.output_dir, "dataset", context.provenance)

    steps = [replace(chain()[0], run=write_weights), replace(chain()[1], run=read_weights)]
    shared = settings.model_copy(update={"store": (tmp_path / "store").as_uri()})
    made = run(shared, steps[:1]).artifacts["first"]
    (made.path / "w.safetensors").unlink()
    outcome = run(shared, steps)
    assert outcome.skipped == ["first"]
    assert (outcome.artifacts["second"].path / "text").read_text() == "ab"
    (made.path / "w.safetensors").unlink()
    assert run(settings, steps[:1]).skipped == [], "without the store it is made again"


def test_run_takes_old_files_out_of_the_store_and_leaves_those_of_a_run_beside(settings: Settings, tmp_path: Path) -> None:
    """Its own order is there, whose program may read them any moment, on a node that this run knows nothing of."""
    store = open_store((tmp_path / "store").as_uri())
    kept = {}
    for name in ("left", "in use"):
        (tmp_path / name).write_text(name)
        kept[name] = store.push_file(tmp_path / name)
        os.utime(tmp_path / "store" / "files" / kept[name], (0, 0))
    orders.write(store, "staging/train-1/config.json", orders.Order(module="m", job={}, files={"rows.jsonl": kept["in use"]}))
    run(settings.model_copy(update={"store": store.place.url}), chain())
    assert store.place.names("files") == [kept["in use"]]


def test_changed_config_redoes_that_step_and_those_after_it(settings: Settings) -> None:
    run(settings, chain())
    assert run(settings, chain(second="c")).skipped == ["first"]
    assert run(settings, chain(first="x")).skipped == []


def test_equal_output_of_a_changed_step_saves_those_after_it(settings: Settings) -> None:
    run(settings, chain())
    steps = chain()
    steps[0] = Step("first", 2, "dataset", Text(text="a"), write_text)
    assert run(settings, steps).skipped == ["second"]


def test_plan_says_what_would_run_without_writing(settings: Settings) -> None:
    assert [item.will_run for item in runner.plan(settings, chain())] == [True, True]
    assert not settings.home.exists()
    run(settings, chain())
    assert [item.will_run for item in runner.plan(settings, chain())] == [False, False]
    assert [item.will_run for item in runner.plan(settings, chain(second="c"))] == [False, True]


def test_failed_step_leaves_its_attempt_and_the_next_run_resumes_it(settings: Settings) -> None:
    def fail_once(config: Text, context: StepContext) -> None:
        part = context.output_dir / "part"
        if not part.exists():
            part.write_text("half")
            raise TransientError("lost")
        part.unlink()
        write_text(config, context)

    with pytest.raises(TransientError):
        run(settings, chain(run_second=fail_once))
    resumed = runner.plan(settings, chain(run_second=fail_once))[1]
    assert "resumes" in resumed.reason
    outcome = run(settings, chain(run_second=fail_once))
    assert outcome.skipped == ["first"]
    assert list(settings.staging_dir.iterdir()) == []


def test_artifact_with_a_lost_file_is_made_again(settings: Settings) -> None:
    outcome = run(settings, chain())
    (outcome.artifacts["first"].path / "text").unlink()
    again = run(settings, chain())
    assert again.skipped == ["second"]
    assert (again.artifacts["first"].path / "text").read_text() == "a"


def test_step_without_a_manifest_is_an_error(settings: Settings) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        run(settings, chain(run_second=lambda _config, _context: None))


def test_two_runs_at_once_make_each_artifact_once(settings: Settings) -> None:
    made: list[str] = []
    both_started = threading.Barrier(2, timeout=30)

    def slow(config: Text, context: StepContext) -> None:
        made.append(config.text)
        write_text(config, context)

    def one_run() -> None:
        both_started.wait()
        run(settings, chain(run_second=slow))

    threads = [threading.Thread(target=one_run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == ["b"]


class FailJob(Job):
    """A job for programs written by these tests."""


def start_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "program_under_test.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = FailJob(output_dir=tmp_path)
    local.run_to_end("program_under_test", job, tmp_path / "config.json", tmp_path / "log", on_tick=lambda: None)


def test_program_that_raises_a_known_error_passes_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "from infra.process import Job, run_program\nfrom infra.errors import ConfigError\n"
        "def main(job: Job) -> None:\n    raise ConfigError('rows.jsonl:3: not JSON')\nrun_program(Job, main)\n"
    )
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3"):
        start_program(tmp_path, monkeypatch, body)


def test_program_that_crashes_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlipwayError, match="ZeroDivisionError"):
        start_program(tmp_path, monkeypatch, "1 / 0\n")


def test_program_that_is_killed_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransientError, match="SIGKILL"):
        start_program(tmp_path, monkeypatch, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")


def test_program_whose_driver_is_killed_stops_too(tmp_path: Path) -> None:
    (tmp_path / "program_under_test.py").write_text(
        "import pathlib, time\nfrom infra.process import Job, run_program\n"
        "def main(job: Job) -> None:\n"
        "    (job.output_dir / 'started').touch()\n"
        "    try:\n        time.sleep(60)\n"
        "    finally:\n        (job.output_dir / 'stopped').touch()\n"
        "run_program(Job, main)\n"
    )
    driver = (
        "import pathlib\nfrom infra.process import Job\nfrom pipelines.executors import local\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "local.run_to_end('program_under_test', Job(output_dir=folder), folder / 'config.json', folder / 'log', on_tick=lambda: None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    with subprocess.Popen([sys.executable, "-c", driver], env=environment) as process:
        wait_for(tmp_path / "started")
        process.kill()
    wait_for(tmp_path / "stopped")
