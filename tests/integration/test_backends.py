"""MLflow's back ends for real: PostgreSQL with an S3 server, and a tracking server that asks for an account."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import aliases, registry, tracking, uploads
from infra.contracts import Manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError, TransientError
from infra.metric_stream import MetricStream
from infra.process import TrackingTarget
from infra.provenance import Provenance
from tests import backends
from tests.integration.conftest import chat_row
from tests.unit.test_promotion import check_kills, race

PART_BYTES = 1 << 20
SIZES = {"config.json": 300, "weights/openvino_model.bin": 2 * PART_BYTES + 17}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in backends.S3_KEYS.items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with backends.postgres() as uri:
        yield uri


@pytest.fixture(scope="module")
def bucket(place: Path, environment: pytest.MonkeyPatch) -> Iterator[str]:
    with backends.s3(place) as url:
        environment.setenv("MLFLOW_S3_ENDPOINT_URL", url)
        yield url


@pytest.fixture(scope="module")
def server(place: Path, database: str, bucket: str, environment: pytest.MonkeyPatch) -> Iterator[backends.MlflowServer]:
    """It keeps runs in the database and files in the bucket, and hands them on itself."""
    options, variables = backends.with_accounts(place / "accounts")
    stores = ["--backend-store-uri", database, "--artifacts-destination", "s3://models/served"]
    with backends.mlflow_server(place / "server", [*stores, *options], variables) as running:
        environment.setenv("MLFLOW_TRACKING_USERNAME", backends.ACCOUNT)
        environment.setenv("MLFLOW_TRACKING_PASSWORD", backends.PASSWORD)
        yield running


def artifact(folder: Path, seed: int = 0, sizes: dict[str, int] = SIZES) -> Manifest:
    """A folder of bytes that no compression shortens, with its manifest."""
    source = random.Random(seed)
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for start in range(0, size, PART_BYTES):
                stream.write(source.randbytes(min(PART_BYTES, size - start)))
    return write_manifest(folder, "quantized", Provenance())


def registered(client: Any, uri: str, name: str, folder: Path, digest: str, root: str | None) -> registry.RegisteredVersion:
    """The artifact as a version of `name`, its files in a run."""
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, f"of-{name}", root), "run")
    assert tracking.is_shared(client, uri, run_id)
    scratch = folder.parent / "scratch"
    return registry.register(
        client, name, folder, digest, run_id, lambda: uploads.upload(client, run_id, folder, scratch, PART_BYTES, patience_s=30)
    )


def store_of(kind: str, request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """Address of the store, and where runs keep files where it does not know itself."""
    request.getfixturevalue("bucket")
    return (
        (request.getfixturevalue("database"), "s3://models/direct") if kind == "database" else (request.getfixturevalue("server").url, None)
    )


@pytest.mark.parametrize("kind", ["database", "server"])
def test_version_promoted_here_can_be_served_from_another_machine(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri, root = store_of(kind, request)
    client, name = tracking.client(uri), f"shared-{kind}"
    manifest = artifact(tmp_path / "made")
    version = registered(client, uri, name, tmp_path / "made", manifest.digest, root)
    assert not version.is_local
    again = registered(client, uri, name, tmp_path / "made", manifest.digest, root)
    assert again.version == "1", "the same artifact is not uploaded twice"
    registry.promote(client, version)
    parts = {item.path: item.file_size for item in client.list_artifacts(version.run_id, "model/weights/openvino_model.bin.parts")}
    assert sorted(parts.values()) == [17, PART_BYTES, PART_BYTES]

    found = registry.resolve(client, name)
    elsewhere = tmp_path / "elsewhere" / "artifacts"
    folder = uploads.download(client, found.run_id, found.digest, elsewhere)
    assert verify(folder, ("quantized",)).digest == manifest.digest
    assert [path.name for path in elsewhere.iterdir()] == [folder.name]
    before = folder.stat().st_mtime_ns
    assert uploads.download(client, found.run_id, found.digest, elsewhere).stat().st_mtime_ns == before, "fetched once"


def test_artifact_changed_in_the_store_is_refused_and_leaves_nothing(database: str, bucket: str, tmp_path: Path) -> None:
    client = tracking.client(database)
    manifest = artifact(tmp_path / "made", seed=1)
    version = registered(client, database, "altered", tmp_path / "made", manifest.digest, "s3://models/direct")
    (tmp_path / "000001").write_bytes(b"\0" * PART_BYTES)
    client.log_artifact(version.run_id, str(tmp_path / "000001"), "model/weights/openvino_model.bin.parts")
    with pytest.raises(ArtifactError, match=r"openvino_model.bin: sha256 is"):
        uploads.download(client, version.run_id, version.digest, tmp_path / "artifacts")
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.slow
def test_two_promotions_at_once_on_postgresql_one_wins(database: str, bucket: str, tmp_path: Path) -> None:
    client = tracking.client(database)
    for seed in (1, 2):
        manifest = artifact(tmp_path / f"made-{seed}", seed, {"config.json": 10})
        registered(client, database, "raced", tmp_path / f"made-{seed}", manifest.digest, "s3://models/direct")
    told = race(database, "raced", "1", "2")
    assert aliases.read(client, "raced") == {registry.CHAMPION: "1" if told[0]["won"] else "2"}


@pytest.mark.parametrize("kind", ["database", pytest.param("server", marks=pytest.mark.slow)])
def test_connection_that_is_cut_costs_a_part_and_not_the_upload(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, root = store_of(kind, request)
    behind = request.getfixturevalue("bucket") if kind == "database" else uri
    cutter = backends.Cutter(int(behind.rpartition(":")[2]), after_bytes=PART_BYTES // 2, num_cuts=3)
    through = f"http://127.0.0.1:{cutter.port}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # so that it is Slipway that tries again
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if kind == "database":
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", through)
    client = tracking.client(uri if kind == "database" else through)
    manifest = artifact(tmp_path / "made", seed=3)
    version = registered(client, through if kind == "server" else uri, f"cut-{kind}", tmp_path / "made", manifest.digest, root)
    cutter.close()
    assert cutter.num_cut == 3
    if kind == "database":
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", behind)
    folder = uploads.download(tracking.client(uri), version.run_id, version.digest, tmp_path / "artifacts")
    assert verify(folder).digest == manifest.digest


@pytest.mark.slow
def test_store_that_takes_nothing_is_told_after_a_while(
    server: backends.MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutter = backends.Cutter(server.port, after_bytes=PART_BYTES // 2, num_cuts=1000)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = tracking.client(f"http://127.0.0.1:{cutter.port}")
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "away", None), "run")
    artifact(tmp_path / "made", sizes={"big.bin": PART_BYTES})
    with pytest.raises(TransientError, match=r"big\.bin into run"):
        uploads.upload(client, run_id, tmp_path / "made", tmp_path, patience_s=1.0)
    cutter.close()


def test_server_that_does_not_know_us_names_the_variables(server: backends.MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password-of-ours")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        tracking.ensure_experiment(tracking.client(server.url), "refused", None)
    assert "wrong-password-of-ours" not in refused.value.message


def slipway(home: Path, uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SLIPWAY_HOME": str(home),
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_password_in_the_address_reaches_the_server_and_no_text(
    server: backends.MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    uri = server.url.replace("://", f"://{backends.ACCOUNT}:{backends.PASSWORD}@")
    done = slipway(tmp_path, uri, "promote", "absent", "--json")
    assert done.returncode == 2, done.stderr
    assert "absent" in done.stderr
    assert "slipway status" in done.stderr, "it was let in, and found no such model"
    assert backends.PASSWORD not in done.stdout + done.stderr


@pytest.mark.slow
def test_metrics_of_a_run_survive_a_server_that_is_stopped_and_started(
    server: backends.MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    client = tracking.client(server.url)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "outage", None), "run")
    unsent = tmp_path / "unsent.jsonl"
    with MetricStream(TrackingTarget(uri=server.url, run_id=run_id, unsent_file=unsent)) as stream:
        for step in range(30):
            stream.log({"loss": float(step), "rate": 1.0}, step)
            if step == 10:
                server.stop()
            if step == 20:
                deadline_s = time.monotonic() + 60
                while not unsent.is_file():
                    assert time.monotonic() < deadline_s
                    time.sleep(0.05)
                server.start()
    for name in ("loss", "rate"):
        assert [metric.step for metric in client.get_metric_history(run_id, name)] == list(range(30))
    assert not unsent.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["database", "server"])
def test_promotion_killed_before_any_call_leaves_the_old_aliases_or_the_new(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri, root = store_of(kind, request)
    client, name = tracking.client(uri), f"killed-{kind}"
    for seed in (1, 2, 3):
        manifest = artifact(tmp_path / f"made-{seed}", seed, {"config.json": 10})
        version = registered(client, uri, name, tmp_path / f"made-{seed}", manifest.digest, root)
        if seed < 3:
            registry.promote(client, version)
    watch_uri = f"{uri}?application_name=watch" if kind == "database" else uri.replace("127.0.0.1", "localhost")
    check_kills(client, uri, watch_uri, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["database", "server"])
def test_artifact_of_two_gigabytes_goes_up_in_parts_though_connections_are_cut(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, root = store_of(kind, request)
    behind = request.getfixturevalue("bucket") if kind == "database" else uri
    cutter = backends.Cutter(int(behind.rpartition(":")[2]), after_bytes=3 << 20, num_cuts=5)
    through = f"http://127.0.0.1:{cutter.port}"
    if kind == "database":
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", through)
    client = tracking.client(uri if kind == "database" else through)
    manifest = artifact(tmp_path / "made", 5, {"weights.bin": 2 << 30})
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, f"large-{kind}", root), "run")
    uploads.upload(client, run_id, tmp_path / "made", tmp_path)
    assert cutter.num_cut == 5
    assert len(client.list_artifacts(run_id, "model/weights.bin.parts")) == 32
    cutter.close()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", request.getfixturevalue("bucket"))
    folder = uploads.download(tracking.client(uri), run_id, manifest.digest, tmp_path / "artifacts")
    assert (folder / "weights.bin").stat().st_size == 2 << 30


@pytest.mark.slow
def test_whole_run_on_a_server_with_accounts_is_served_from_another_machine(
    server: backends.MlflowServer, toy_model: Path, free_port: int, tmp_path: Path
) -> None:
    for name, numbers in (("train", range(96)), ("heldout", range(100, 108))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    spec = {
        "name": "toy-shared",
        "base_model": f"file:{toy_model}",
        "dataset": {"type": "files", "train": "train.jsonl", "heldout": "heldout.jsonl"},
        "train": {"epochs": 1, "batch_rows": 8, "micro_batch_rows": 8, "lora": {"rank": 4}},
        "evaluate": {"max_new_tokens": 8},
        "gates": {"min_score": 0, "min_gain": -1, "max_quantization_drop": 1, "min_merge_agreement": 0},
        "serve": {"port": free_port},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(spec))
    here, there = tmp_path / "here", tmp_path / "there"
    done = slipway(here, server.url, "run", str(tmp_path / "toy.yaml"), "--no-serve", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["aliases"] == ["challenger", "champion"]

    client = tracking.client(server.url)
    losses = [run for run in client.search_runs([client.get_run(report["run_id"]).info.experiment_id]) if "loss" in run.data.metrics]
    assert len(losses) == 1, "the metrics of training reached the server, from a process that knows the account by its environment"
    texts = [path.read_bytes() for path in here.rglob("*") if path.is_file()]
    texts += [json.dumps(run.to_dictionary()).encode() for run in client.search_runs([losses[0].info.experiment_id])]
    assert len(texts) > 50
    assert not [text for text in texts if backends.PASSWORD.encode() in text]

    (tmp_path / "ask.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "lamp 1 red"}], "max_tokens": 4}) + "\n")
    ask = ["batch", "toy-shared@champion", str(tmp_path / "ask.jsonl"), str(tmp_path / "answers"), "--json"]
    done = slipway(there, server.url, *ask)
    assert (done.returncode, "no key is trusted here" in done.stderr) == (2, True), done.stderr
    done = slipway(there, server.url, *ask, "--set", f"serve.trusted_keys_file={here / 'keys' / 'signing.pub'}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 1
    (fetched,) = (there / "artifacts").iterdir()
    assert verify(fetched, ("quantized",)).digest == report["model"]["digest"]
