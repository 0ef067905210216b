"""What a command's MODEL names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra import registry, tracking
from infra.contracts import write_manifest
from infra.errors import ArtifactError, ConfigError, RegistryError
from infra.provenance import Provenance
from infra.settings import Settings
from pipelines.target import find_target


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store with two versions of `lamp`: the champion, and one above it."""
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, tracking_uri=f"sqlite:///{home}/mlflow.db")
    client = tracking.client(settings.tracking_uri)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "tests", home / "artifacts"), "run")
    versions = [registry.register(client, "lamp", home / name, name, run_id) for name in ("first", "second")]
    registry.promote(client, versions[0])
    registry.mark_challenger(client, versions[1], [])
    return settings


def test_target_name_means_its_champion_and_an_alias_what_it_points_at(settings: Settings) -> None:
    overrides = ["serve.port=8123", "batch.rows_per_part=9"]
    champion, challenger = (find_target(name, overrides, settings) for name in ("lamp", "lamp@challenger"))
    assert (champion.name, champion.model_dir.name, champion.serve.port, champion.batch.rows_per_part) == ("lamp", "first", 8123, 9)
    assert (challenger.name, challenger.model_dir.name) == ("lamp", "second")
    with pytest.raises(RegistryError, match="absent: not in the registry"):
        find_target("absent", [], settings)
    with pytest.raises(ConfigError, match=r"serve.prot: unknown key; did you mean 'port'"):
        find_target("lamp", ["serve.prot=1"], settings)


def test_target_spec_gives_its_champion_and_its_own_options(settings: Settings, tmp_path: Path) -> None:
    rows = {"type": "files", "train": "rows.jsonl"}
    spec = {"name": "lamp", "base_model": "file:base", "dataset": rows, "serve": {"port": 8124}, "batch": {"format": "parquet"}}
    (tmp_path / "lamp.yaml").write_text(yaml.safe_dump(spec))
    target = find_target(str(tmp_path / "lamp.yaml"), ["serve.engine=torch"], settings)
    assert (target.model_dir.name, target.serve.port, target.serve.engine, target.batch.format) == ("first", 8124, "torch", "parquet")


def test_target_folder_of_an_artifact_is_that_model(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "quantized-1"
    folder.mkdir()
    with pytest.raises(ArtifactError, match="not a complete artifact"):
        find_target(str(folder), [], settings)
    write_manifest(folder, "quantized", Provenance())
    target = find_target(str(folder), ["serve.cache_gb=2"], settings)
    assert (target.name, target.model_dir, target.serve.cache_gb) == ("quantized-1", folder, 2)
