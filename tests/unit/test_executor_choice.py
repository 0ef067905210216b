"""What is asked of a machine that only drives, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from infra.errors import ConfigError, TransientError
from infra.network import free_port
from infra.settings import Settings, load_settings
from pipelines import preflight, runner
from pipelines.plan import build_steps
from pipelines.spec import Spec
from tests.jobs_api import JobsApi, jobs_api


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    (tmp_path / "rows.jsonl").touch()
    dataset = {"type": "files", "train": str(tmp_path / "rows.jsonl")}
    return Spec.model_validate({"name": "toy", "base_model": "hf:some/model", "dataset": dataset, "serve": {"port": free_port()}})


@pytest.fixture
def api(tmp_path: Path) -> Any:
    with jobs_api(tmp_path / "api") as running:
        running.token = "right"
        yield running


@pytest.fixture(autouse=True)
def light_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of either stack is installed."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)


def settings(tmp_path: Path, api: JobsApi, **fields: Any) -> Settings:
    whole = {"executor": "ray", "store": str(tmp_path / "store"), "tracking_uri": "http://mlflow", "ray_token": SecretStr("right")}
    return Settings.model_validate({"home": tmp_path / "home", "ray_jobs_address": api.address, **whole, **fields})


def check(spec: Spec, chosen: Settings, will_serve: bool = False) -> None:
    preflight.check(spec, runner.plan(chosen, build_steps(spec)), chosen, will_serve)


def test_machine_without_the_stacks_can_drive_a_cluster_and_not_work_itself(spec: Spec, tmp_path: Path, api: JobsApi) -> None:
    check(spec, settings(tmp_path, api))
    with pytest.raises(ConfigError, match=r"these packages are not installed: .*torch"):
        check(spec, settings(tmp_path, api, executor="local"))


def test_machine_without_the_engine_is_told_so_before_it_is_to_serve(spec: Spec, tmp_path: Path, api: JobsApi) -> None:
    with pytest.raises(ConfigError, match=r"to serve what is promoted.*openvino_genai.*--no-serve"):
        check(spec, settings(tmp_path, api), will_serve=True)


def test_everything_that_a_cluster_needs_is_asked_for_at_once(spec: Spec, tmp_path: Path, api: JobsApi) -> None:
    with pytest.raises(ConfigError) as raised:
        check(spec, settings(tmp_path, api, store=None, tracking_uri="sqlite:////here/mlflow.db"))
    assert "SLIPWAY_STORE" in str(raised.value)
    assert "MLFLOW_TRACKING_URI" in str(raised.value)


def test_cluster_that_refuses_or_is_away_is_found_before_anything_starts(
    spec: Spec, tmp_path: Path, api: JobsApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
        check(spec, settings(tmp_path, api, ray_token=SecretStr("wrong")))
    monkeypatch.setattr(preflight, "RAY_PATIENCE_S", 0.1)
    with pytest.raises(TransientError, match="has not answered"):
        check(spec, settings(tmp_path, api, ray_jobs_address=f"http://127.0.0.1:{free_port()}"))


def test_executor_of_the_command_comes_before_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    for value, given, found in (("ray", None, "ray"), ("ray", "local", "local"), ("", None, "local"), ("", "ray", "ray")):
        monkeypatch.setenv("SLIPWAY_EXECUTOR", value)
        assert load_settings(given).executor == found
    monkeypatch.setenv("SLIPWAY_EXECUTOR", "slurm")
    with pytest.raises(ConfigError, match="SLIPWAY_EXECUTOR=slurm: one of local, ray, kubernetes"):
        load_settings()
    with pytest.raises(ConfigError, match="--executor slurm"):
        load_settings("slurm")


def test_ray_s_token_is_found_where_ray_s_own_commands_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLIPWAY_HOME": str(tmp_path), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert load_settings().ray_token is None
    (tmp_path / ".ray").mkdir()
    for place, variables in {".ray/auth_token": {}, "token": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}}.items():
        (tmp_path / place).write_text(f"{place}\n")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        token = load_settings().ray_token
        assert token is not None
        assert token.get_secret_value() == place
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    token = load_settings().ray_token
    assert token is not None
    assert token.get_secret_value() == "given"
