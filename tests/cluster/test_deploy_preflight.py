"""What `slipway deploy` refuses before it pushes a model or asks a cluster: all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import ConfigError
from infra.settings import Settings
from pipelines.charts import Chart
from pipelines.deploy import commands
from pipelines.deploy.preflight import check
from tests.cluster.test_deploy_values import MODEL, write_spec

ALLOWED = {"config": {"serve": {"allow_unsigned": ["toy.model_1"]}}}
GIVEN = {"config": {"model": MODEL, **ALLOWED["config"]}}
SHARED = {"store": {"url": "file:///mnt/store", "existingClaim": "shared"}}
SERVER, OWN = "http://mlflow:5000", "sqlite:////home/me/mlflow.db"


def refused(
    folder: Path,
    store: str | None = "s3://bucket/slipway",
    values: dict[str, Any] | None = None,
    chart: Chart = "serving",
    tracking_uri: str = SERVER,
    profile: str | None = None,
    **spec: Any,
) -> list[str]:
    """The lines of what is refused; none where nothing is."""
    (folder / "values.yaml").write_text(yaml.safe_dump(ALLOWED if values is None else values))
    settings = Settings(home=folder / "home", tracking_uri=tracking_uri, store=store)
    try:
        check(chart, write_spec(folder, **spec), [], [folder / "values.yaml"], profile, settings)
    except ConfigError as error:
        return error.message.splitlines()
    return []


def test_store_on_a_folder_of_this_machine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "file:///home/me/store")
    assert line.startswith(
        "SLIPWAY_STORE is file:///home/me/store, a folder of this machine, and pods need a store that they reach too. Set"
    )
    assert "s3://BUCKET/PREFIX" in line
    assert "store.existingClaim" in line
    assert refused(tmp_path, "file:///home/me/store", chart="training", values={}) == [line]
    assert refused(tmp_path, "file:///home/me/store", values=GIVEN) == [line]


def test_store_of_this_machine_that_no_pod_needs_is_no_matter(tmp_path: Path) -> None:
    version = {"type": "registry", "name": "toy.model_1", "version": "1", "digest": "a" * 64}
    from_registry = {"config": {**ALLOWED["config"], "model": version}}
    assert refused(tmp_path, "file:///home/me/store", values=from_registry) == []
    assert refused(tmp_path, "file:///home/me/store", chart="tracking", values={}) == []
    adapters = {"adapters": {"red": "/home/me/red"}, "allow_unsigned": ["toy.model_1", "red"]}
    (line,) = refused(tmp_path, "file:///home/me/store", values={"config": {"model": version}}, serve=adapters)
    assert line.startswith("SLIPWAY_STORE is file:///home/me/store")


def test_store_on_a_volume_that_pods_share_is_good_where_its_claim_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, "file:///home/me/store", values={**ALLOWED, **SHARED}) == []
    assert refused(tmp_path, "file:///home/me/store", chart="training", values={}, profile="laptop") == []
    (line,) = refused(tmp_path, values={**ALLOWED, "store": {"url": "file:///mnt/store"}})
    assert line.startswith("store.url is file:///mnt/store, a path of each pod's own. Name a volume that all pods share")


def test_store_of_the_values_must_be_the_one_that_the_model_is_put_into(tmp_path: Path) -> None:
    other = {"store": {"url": "s3://other/place"}}
    (line,) = refused(tmp_path, values={**ALLOWED, **other})
    assert line.startswith("store.url is s3://other/place, where pods look, and SLIPWAY_STORE is s3://bucket/slipway")
    assert refused(tmp_path, values={**GIVEN, **other}) == []


def test_model_that_lies_on_this_machine_alone_is_refused(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, None, tracking_uri=OWN)
    assert line.startswith("SLIPWAY_STORE is not set, and the model lies on this machine, where no pod reaches it. Set SLIPWAY_STORE")
    assert refused(tmp_path, None) == []


def test_files_of_this_machine_that_the_spec_names_are_refused(tmp_path: Path) -> None:
    (keys,) = refused(tmp_path, serve={"api_keys_file": "/home/me/api_keys.json"})
    assert "apiKeys.existingSecret" in keys
    assert refused(tmp_path, values={**ALLOWED, "apiKeys": {"existingSecret": "keys"}}, serve={"api_keys_file": "/home/me/keys.json"}) == []
    guesses = {"speculative": {"kind": "draft", "draft_model_dir": "/here/small"}}
    (draft,) = refused(tmp_path, serve=guesses)
    assert "/here/small, a folder of this machine" in draft
    there = {"config": {"serve": {**ALLOWED["config"]["serve"], "speculative": {"draft_model_dir": "/models/small"}}}}
    assert refused(tmp_path, values=there, serve=guesses) == []


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    """Store, keys, and what the chart itself refuses, each once."""
    values = {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}, "ingress": {"enabled": True, "tlsSecret": "tls"}}
    lines = refused(tmp_path, "file:///home/me/store", values=values, serve={"api_keys_file": "/home/me/api_keys.json"})
    told = ["SLIPWAY_STORE is", "serve.api_keys_file is", "no key is trusted, and toy.model_1", "ingress.host is empty", "minReplicas 9"]
    assert [sum(part in line for line in lines) for part in told] == [1] * 5
    assert not any("store.url is empty" in line or "apiKeys.existingSecret is empty" in line for line in lines)


def test_spec_values_and_profile_that_cannot_be_read_are_told_together(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, tracking_uri=SERVER, store="file:///home/me/store")
    with pytest.raises(ConfigError) as raised:
        check("serving", write_spec(tmp_path, serv={}), [], [tmp_path / "absent.yaml"], "huge", settings)
    for said in ("serv: unknown key", "absent.yaml: no such file", "profile 'huge'", "SLIPWAY_STORE is file:///home/me/store"):
        assert said in raised.value.message


def test_deploy_is_refused_before_the_registry_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none at that address, nor a cluster."""
    for name, value in {"HOME": "home", "STORE": "store"}.items():
        monkeypatch.setenv(f"SLIPWAY_{name}", str(tmp_path / value))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    wanted = commands.Wanted(write_spec(tmp_path), [], "serving", None, "champion", None, [])
    with pytest.raises(ConfigError, match=r"(?s)SLIPWAY_STORE is file://.*no key is trusted"):
        commands.deploy(wanted, commands.Place(tmp_path / "kubeconfig"), None, None, None, False, as_json=True)
    assert not (tmp_path / "store").exists()
