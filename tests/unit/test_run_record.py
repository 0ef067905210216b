"""A driver that was cut off and starts again goes on with the MLflow runs that it began; one that ended does not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from infra.config import Config
from infra.contracts import write_manifest
from infra.errors import ConfigError, TransientError
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines import pipeline, runner
from pipelines.display import Display
from pipelines.run_record import RunRecords
from pipelines.spec import Spec
from pipelines.step import Step, StepContext


class Empty(Config):
    """A step's config."""


class Cut(BaseException):
    """Ends a driver at once, as SIGKILL would: nobody catches it."""


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all: making one takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def settings(tmp_path: Path, tracking_uri: str) -> Settings:
    return Settings(home=tmp_path / "home", tracking_uri=tracking_uri, store=str(tmp_path / "store"))


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    (tmp_path / "rows.jsonl").touch()
    dataset = {"type": "files", "train": str(tmp_path / "rows.jsonl")}
    return Spec.model_validate({"name": "toy", "base_model": f"file:{tmp_path}", "dataset": dataset})


def drive(spec: Spec, settings: Settings, error: BaseException | None = None) -> dict[str, Any]:
    """A pipeline of one step, in which `error` is raised; the ids of its runs and the run's folder."""
    seen: dict[str, Any] = {}

    def run(config: Empty, context: StepContext) -> None:
        assert context.tracking is not None
        seen["step"] = context.tracking.run_id
        if error is not None:
            raise error
        write_manifest(context.output_dir, "base", context.provenance)

    run_dir = pipeline.make_run_dir(spec, settings)
    kinds = (Cut, KeyboardInterrupt, TransientError, ConfigError)
    with contextlib.suppress(*kinds), pipeline.tracked_run(spec, settings, run_dir) as tracked:
        seen |= {"run": tracked.run_id, "dir": run_dir.name, "client": tracked.client}
        runner.run(settings, [Step("base", 1, "base", Empty(), run)], run_dir, Provenance(), tracked, Display(quiet=True))
    return seen


def ids(seen: dict[str, Any]) -> tuple[str, str, str]:
    return seen["run"], seen["step"], seen["dir"]


@pytest.mark.parametrize("error", [Cut(), KeyboardInterrupt(), TransientError("the cluster is away")])
def test_pipeline_cut_off_goes_on_in_the_same_runs_from_another_home_too(spec: Spec, settings: Settings, error: BaseException) -> None:
    cut = drive(spec, settings, error)
    elsewhere = settings.model_copy(update={"home": settings.home.with_name("other")})
    again = drive(spec, elsewhere)
    assert ids(again) == ids(cut)
    runs = {name: again["client"].get_run(again[name]).info.status for name in ("run", "step")}
    assert runs == {"run": "FINISHED", "step": "FINISHED"}
    experiment_id = again["client"].get_run(again["run"]).info.experiment_id
    found = again["client"].search_runs([experiment_id], f"tags.`slipway.spec_fingerprint` = '{spec.fingerprint}'")
    assert [each.info.run_id for each in found] == [again["run"]]


@pytest.mark.parametrize("error", [ConfigError("rows.jsonl:3"), None])
def test_pipeline_that_ended_by_itself_is_followed_by_a_run_of_its_own(spec: Spec, settings: Settings, error: BaseException | None) -> None:
    first = drive(spec, settings, error)
    assert first["run"] != drive(spec, settings.model_copy(update={"home": settings.home.with_name("other")}), Cut())["run"]


def test_run_that_was_deleted_is_begun_anew(spec: Spec, settings: Settings) -> None:
    cut = drive(spec, settings, Cut())
    cut["client"].delete_run(cut["run"])
    assert drive(spec, settings)["run"] != cut["run"]


def test_step_that_was_made_when_its_driver_was_killed_has_its_run_ended(
    spec: Spec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_made_tags", lambda artifact: (_ for _ in ()).throw(Cut()))
        cut = drive(spec, settings)
    cut["client"].update_run(cut["step"], status="RUNNING")  # SIGKILL would have left it so
    again = drive(spec, settings)
    assert (again["run"], "step" in again) == (cut["run"], False)
    run = again["client"].get_run(cut["step"])
    assert (run.info.status, set(run.data.tags) >= {"slipway.artifact", "slipway.digest"}) == ("FINISHED", True)


@pytest.mark.parametrize("noting", ["begin", "begin_step"])
def test_driver_killed_between_making_a_run_and_noting_it_finds_it_again(
    spec: Spec, settings: Settings, noting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(RunRecords, noting, cut)
        drive(spec, settings)
    seen = drive(spec, settings.model_copy(update={"home": settings.home.with_name("other")}))
    experiment_id = seen["client"].get_run(seen["run"]).info.experiment_id
    parents = seen["client"].search_runs([experiment_id], f"tags.`slipway.spec_fingerprint` = '{spec.fingerprint}'")
    assert [each.info.run_id for each in parents] == [seen["run"]]
    steps = seen["client"].search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{seen['run']}'")
    assert [each.info.run_id for each in steps] == [seen["step"]]
