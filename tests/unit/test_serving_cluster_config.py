"""What may be said of serving on a cluster, and where a replica gets what it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra import registry, tracking, uploads
from infra.config import parse
from infra.contracts import verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.provenance import Provenance
from infra.settings import load_cluster_addresses, load_settings
from serving.cluster_config import ClusterArguments, ClusterConfig, PathSource, RegistrySource, StoreSource
from serving.model_source import fetch

TOKEN, DIGEST = "t" * 40, "a" * 64


def config(**changes: Any) -> ClusterConfig:
    serve = {"host": "0.0.0.0", "cpus_per_replica": 1, **changes.pop("serve", {})}
    model = {"type": "store", "digest": DIGEST}
    return parse(ClusterConfig, {"model_name": "toy", "model": model, **changes, "serve": serve}, "values")


def test_cluster_config_that_names_one_machine_is_refused_with_every_problem() -> None:
    serve = {
        "host": "127.0.0.1", "adapters": {"red": "folder"}, "api_keys_file": "keys.json", "cpus_per_replica": None,
        "pools": [{"name": "gpu", "model_dir": "folder"}],
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config(serve=serve, pool_models={"tpu": {"type": "store", "digest": DIGEST}}, first_replica_port=65500)
    for part in (
        "serve.host",
        "serve.adapters",
        "api_keys_file",
        "pools.gpu.model_dir",
        "'tpu'",
        "past 65535",
        "cpus_per_replica of pool gpu",
    ):
        assert part in str(caught.value)


def test_cluster_config_through_json_is_equal_and_keeps_what_was_not_said() -> None:
    said = config(adapters={"red": {"type": "registry", "name": "lamp", "version": "3", "digest": DIGEST}})
    again = ClusterConfig.model_validate_json(said.model_dump_json(exclude_unset=True))
    assert again == said
    assert "engine" not in again.serve.model_fields_set, "a default that was written out would choose the engine"
    assert ClusterArguments(config=said).pool == ""


@pytest.mark.parametrize(
    ("token", "gateways", "said"),
    [("short", "a:1", "5 characters"), (TOKEN, "gateways", "host:port"), (None, "a:1", "SLIPWAY_FRONT_TOKEN_FILE")],
)
def test_cluster_addresses_of_another_form_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, gateways: str, said: str
) -> None:
    if token is not None:
        (tmp_path / "token").write_text(token)
    monkeypatch.setenv("SLIPWAY_FRONT_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("SLIPWAY_GATEWAYS", gateways)
    with pytest.raises(ConfigError, match=said):
        load_cluster_addresses()


def test_path_source_with_another_digest_than_lies_there_is_refused(toy_base: Path) -> None:
    settings: Any = None
    assert fetch(PathSource(path=toy_base), settings) == toy_base
    with pytest.raises(ArtifactError, match=DIGEST):
        fetch(PathSource(path=toy_base, digest=DIGEST), settings)


def test_source_without_a_digest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.store\.digest"):
        config(model={"type": "store"})


def test_version_of_the_registry_is_fetched_once_and_only_with_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "node"))
    settings = load_settings()
    mlflow = tracking.client(settings.tracking_uri)
    run_id = tracking.start_run(mlflow, tracking.ensure_experiment(mlflow, "tests", tmp_path / "artifacts"), "run")
    made = tmp_path / "made"
    made.mkdir()
    (made / "weights").write_bytes(b"1234")
    digest = write_manifest(made, "quantized", Provenance()).digest
    registry.register(mlflow, "here", made, digest, run_id)
    with pytest.raises(ArtifactError, match="where no pod reaches them"):
        fetch(RegistrySource(name="here", version="1", digest=digest), settings)
    registry.register(mlflow, "shared", made, digest, run_id, lambda: uploads.upload(mlflow, run_id, made, tmp_path / "scratch"))
    with pytest.raises(ArtifactError, match=f"its digest is {digest}, and {DIGEST} is to be served"):
        fetch(RegistrySource(name="shared", version="1", digest=DIGEST), settings)
    folder = fetch(RegistrySource(name="shared", version="1", digest=digest), settings)
    assert folder.is_relative_to(settings.home)
    assert verify(folder).digest == digest
    assert fetch(RegistrySource(name="gone", version="7", digest=digest), settings) == folder, "what the node has needs no registry"


def test_store_that_nobody_named_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    monkeypatch.delenv("SLIPWAY_STORE", raising=False)
    with pytest.raises(ConfigError, match="SLIPWAY_STORE is not set"):
        fetch(StoreSource(digest=DIGEST), load_settings())
