"""Addresses of MLflow stores: what is written down holds no password, and a store that cannot work is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ConfigError
from infra.settings import load_settings
from infra.store_address import store_address


@pytest.mark.parametrize(
    ("uri", "clean", "secrets"),
    [
        (
            "https://me:s%40fe@host:5000/mlflow",
            "https://host:5000/mlflow",
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s@fe"},
        ),
        (
            "postgresql+psycopg://me:safe@host/db?sslmode=require",
            "postgresql+psycopg://host/db?sslmode=require",
            {"PGUSER": "me", "PGPASSWORD": "safe"},
        ),
        ("postgresql://me@host/db", "postgresql://host/db", {"PGUSER": "me"}),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000", {}),
        ("mysql+pymysql://me@host/db", "mysql+pymysql://me@host/db", {}),
    ],
)
def test_user_and_password_leave_the_address_for_the_clients_own_variables(uri: str, clean: str, secrets: dict[str, str]) -> None:
    assert store_address(uri, "X") == (clean, secrets)


def test_relative_sqlite_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_address("sqlite:///a/mlflow.db", "X") == (f"sqlite:///{tmp_path}/a/mlflow.db", {})
    assert store_address("sqlite:////abs/mlflow.db", "X") == ("sqlite:////abs/mlflow.db", {})


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns"])
def test_file_store_is_refused_with_what_to_use(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"file store.*sqlite:////ABSOLUTE"):
        store_address(uri, "MLFLOW_TRACKING_URI")


def test_password_that_cannot_be_kept_out_of_files_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        store_address("mysql+pymysql://me:hidden@host/db", "MLFLOW_TRACKING_URI")
    assert "hidden" not in refused.value.message


def test_settings_hold_no_password_and_programs_still_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    monkeypatch.setenv("PGUSER", "")
    monkeypatch.setenv("PGPASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:hidden@host/db")
    monkeypatch.setenv("SLIPWAY_ARTIFACT_ROOT", "s3://bucket/slipway")
    settings = load_settings()
    assert "hidden" not in settings.model_dump_json()
    from infra.settings import child_environment

    assert child_environment()["PGPASSWORD"] == "hidden"
    assert settings.run_files_root == "s3://bucket/slipway"


def test_files_of_runs_lie_here_unless_a_server_or_a_bucket_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    monkeypatch.delenv("SLIPWAY_ARTIFACT_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert load_settings().run_files_root == tmp_path / "mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://host")
    assert load_settings().run_files_root is None
