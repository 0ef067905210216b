"""The registry on a real MLflow store in sqlite."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import registry, tracking
from infra.errors import RegistryError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mlflow")
    client = tracking.client(f"sqlite:///{folder}/mlflow.db")
    return client, tracking.ensure_experiment(client, "tests", folder / "artifacts"), folder


def version_of(store: Any, name: str, digest: str) -> registry.RegisteredVersion:
    client, experiment_id, folder = store
    run_id = tracking.start_run(client, experiment_id, "run")
    artifact = folder / f"quantized {digest}"  # the space checks that the folder survives its way through a URI
    return registry.register(client, name, artifact, digest, run_id)


def test_register_same_artifact_twice_gives_one_version(store: Any) -> None:
    first, second = version_of(store, "once", "d1"), version_of(store, "once", "d1")
    assert (first.version, second.version) == ("1", "1")
    assert first.folder == store[2] / "quantized d1"
    assert version_of(store, "once", "d2").version == "2"


def test_promote_moves_champion_and_keeps_the_way_back(store: Any) -> None:
    client = store[0]
    one, two = version_of(store, "moved", "d1"), version_of(store, "moved", "d2")
    assert registry.promote(client, one).aliases == (registry.CHAMPION,)
    registry.promote(client, two)
    registry.promote(client, two)
    assert registry.resolve(client, "moved", registry.CHAMPION).version == two.version
    assert registry.resolve(client, "moved", registry.PREVIOUS).version == one.version, "promoting twice must not lose it"


def test_challenger_carries_the_outcome_of_its_gates(store: Any) -> None:
    client = store[0]
    version = version_of(store, "refused", "d1")
    registry.mark_challenger(client, version, [{"name": "score", "passed": False, "detail": "0.1"}])
    assert registry.resolve(client, "refused", registry.CHALLENGER).version == version.version
    assert client.get_model_version("refused", version.version).tags[registry.GATES_TAG] == "refused"
    with pytest.raises(RegistryError, match="champion"):
        registry.resolve(client, "refused", registry.CHAMPION)


@pytest.mark.parametrize("name", ["absent", "../etc", "a' or '1'='1"])
def test_resolve_of_an_unknown_name_is_a_registry_error(store: Any, name: str) -> None:
    with pytest.raises(RegistryError, match="slipway status"):
        registry.resolve(store[0], name)


def test_all_versions_lists_newest_first_with_aliases(store: Any) -> None:
    client = store[0]
    version_of(store, "listed", "d1")
    registry.promote(client, version_of(store, "listed", "d2"))
    found = registry.all_versions(client, "listed")
    assert [(item.version, item.aliases) for item in found] == [("2", (registry.CHAMPION,)), ("1", ())]


WRITER = """
import sys
from infra import tracking
client = tracking.client(sys.argv[1])
run_id = tracking.start_run(client, tracking.ensure_experiment(client, sys.argv[2], None), "writes")
for step in range(25):
    tracking.log_metrics(client, run_id, {"loss": 1.0}, step)
print(run_id)
"""


def test_new_sqlite_store_takes_two_processes_that_open_and_write_it_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, uri, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
        for name in ("one", "two")
    ]
    told = [(*writer.communicate(timeout=60), writer.returncode) for writer in writers]
    assert [code for *_, code in told] == [0, 0], told
    client = tracking.client(uri)
    assert [len(client.get_metric_history(out.strip(), "loss")) for out, *_ in told] == [25, 25]
    with contextlib.closing(sqlite3.connect(tmp_path / "new" / "mlflow.db")) as store:
        assert store.execute("PRAGMA journal_mode").fetchone() == ("wal",), "so that a reader never waits for a writer"


def test_run_that_fails_is_marked_with_its_error(store: Any) -> None:
    client, experiment_id, _ = store
    with pytest.raises(ValueError, match="found"), tracking.run(client, experiment_id, "fails") as failed:
        raise ValueError("found 1, needed 2")
    assert client.get_run(failed).info.status == "FAILED"
    assert client.get_run(failed).data.tags["slipway.error"] == "found 1, needed 2"
    with pytest.raises(KeyboardInterrupt), tracking.run(client, experiment_id, "stopped") as stopped:
        raise KeyboardInterrupt
    assert client.get_run(stopped).info.status == "KILLED"


def test_params_of_a_nested_config_have_dotted_names(store: Any) -> None:
    client, experiment_id, _ = store
    with tracking.run(client, experiment_id, "params") as run_id:
        tracking.log_params(client, run_id, {"train": {"lora": {"rank": 16}}, "name": "x"})
    assert client.get_run(run_id).data.params == {"train.lora.rank": "16", "name": "x"}
