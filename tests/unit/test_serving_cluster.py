"""Several fronts before the same replicas, a node that drains, and what may be said of a cluster."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from infra import registry, tracking, uploads
from infra.config import parse
from infra.contracts import verify, write_manifest
from infra.errors import ArtifactError, ConfigError, TransientError
from infra.network import free_port
from infra.provenance import Provenance
from infra.settings import child_environment, load_cluster_addresses, load_settings
from serving.announcement import TOKEN_HEADER, Announcement, FrontAddress, Place
from serving.bell import HttpBell
from serving.cluster_config import ClusterArguments, ClusterConfig, PathSource, RegistrySource, StoreSource
from serving.config import ServeConfig
from serving.fleet import Fleet
from serving.front.server import FrontServer
from serving.gateway import bell
from serving.model_source import fetch
from serving.node import Standing, drain
from serving.replica_http import FromFront, ReplicaServer
from tests.unit.test_serving_api import COMPLETION, make_api, scripted

HOST = "127.0.0.1"
TOKEN = "t" * 40
BODY = {"model": "toy", "prompt": "hi"}
DIGEST = "a" * 64


def config(**changes: Any) -> ClusterConfig:
    serve = {"host": "0.0.0.0", "cpus_per_replica": 1, **changes.pop("serve", {})}
    model = {"type": "store", "digest": DIGEST}
    return parse(ClusterConfig, {"model_name": "toy", "model": model, **changes, "serve": serve}, "values")


class Pair:
    """Two fronts with one token, and a replica that tells both of itself."""

    def __init__(self) -> None:
        self.fronts = [
            FrontServer(ServeConfig(port=free_port()), HOST, model_name="toy", replica_port=free_port(), token=TOKEN) for _ in "ab"
        ]
        self.addresses = [front.start() for front in self.fronts]
        self.urls = [f"http://{HOST}:{front._limits.port}" for front in self.fronts]
        self.exits = AsyncExitStack()
        self.client = httpx.AsyncClient(timeout=20)

    async def add(self, name: str) -> Fleet:
        server = ReplicaServer(FromFront(make_api(scripted("hello")), TOKEN), HOST)
        self.exits.push_async_callback(server.stop)
        standing = Announcement(token=SecretStr(TOKEN), replica=name, host=HOST, port=server.port, num_places=4)
        fleet = Fleet(self.addresses, lambda: standing, lambda: None)
        fleet.start()
        self.exits.push_async_callback(fleet.stop)
        await until(lambda: all(name in self.names(number) for number in range(2)))
        return fleet

    def names(self, number: int, is_counted: bool = False) -> set[str]:
        known = self.fronts[number].replicas.all
        return {replica.name for replica in known if replica.standing.is_counted_here or not is_counted}


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        await made.client.aclose()
        for front in made.fronts:
            await asyncio.to_thread(front.stop)
        await made.exits.aclose()


async def until(is_true: Any) -> None:
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0.01)


def test_fleet_of_two_fronts_both_answer_and_one_counts_each_replica() -> None:
    async def scene() -> None:
        async with pair() as here:
            await here.add("a")
            await here.add("b")
            for url in here.urls:
                assert (await here.client.post(url + COMPLETION, json=BODY)).json()["choices"][0]["text"] == "hello"
            await until(lambda: sorted([*here.names(0, is_counted=True), *here.names(1, is_counted=True)]) == ["a", "b"])

    asyncio.run(scene())


def test_fleet_where_the_counting_front_ends_another_counts() -> None:
    async def scene() -> None:
        async with pair() as here:
            await here.add("a")
            await until(lambda: here.names(0, is_counted=True) ^ here.names(1, is_counted=True) == {"a"})
            counter = 0 if here.names(0, is_counted=True) else 1
            await asyncio.to_thread(here.fronts.pop(counter).stop)
            await until(lambda: here.names(0, is_counted=True) == {"a"})

    asyncio.run(scene())


def test_metrics_of_the_counted_leave_out_a_replica_that_another_front_counts() -> None:
    async def scene() -> None:
        async with pair() as here:
            await here.add("a")
            await until(lambda: here.names(0, is_counted=True) ^ here.names(1, is_counted=True) == {"a"})
            whole = [(await here.client.get(f"{url}/metrics")).text for url in here.urls]
            counted = [(await here.client.get(f"{url}/metrics", params={"of": "counted"})).text for url in here.urls]
            assert all("slipway_engine_up{" in text for text in whole)
            assert sorted("slipway_engine_up{" in text for text in counted) == [False, True]

    asyncio.run(scene())


def test_front_that_leaves_is_unhealthy_and_still_answers() -> None:
    async def scene() -> None:
        async with pair() as here:
            await here.add("a")
            assert (await here.client.get(f"{here.urls[0]}/health")).status_code == 200
            here.fronts[0].leave()
            assert (await here.client.get(f"{here.urls[0]}/health")).status_code == 503
            answer = await here.client.post(here.urls[0] + COMPLETION, json=BODY)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")

    asyncio.run(scene())


def test_replica_ports_that_are_taken_are_passed_over_and_none_is_an_error(busy_port: int) -> None:
    async def scene() -> None:
        first = ReplicaServer(make_api(scripted("hello")), HOST, (busy_port, busy_port + 20))
        assert busy_port < first.port <= busy_port + 20
        await first.stop()
        with pytest.raises(TransientError, match=f"ports {busy_port} to {busy_port}"):
            ReplicaServer(make_api(scripted("hello")), HOST, (busy_port, busy_port))

    asyncio.run(scene())


def test_place_as_json_keeps_the_secret_and_its_text_does_not() -> None:
    place = Place(fronts=(FrontAddress(host="gateways", port=8001, token=SecretStr(TOKEN)),), host=HOST, ports=(1, 2))
    assert Place.model_validate_json(place.as_json()) == place
    assert TOKEN not in str(place)


def test_gateway_told_to_stop_says_so_then_ends_well(tmp_path: Path) -> None:
    port, announce_port = free_port(), free_port()
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "config.json").write_text(config(leave_s=1.0).model_dump_json(exclude_unset=True))
    changes = ["serve.host=127.0.0.2", f"serve.port={port}", f"announce_port={announce_port}"]
    command = [sys.executable, "-m", "serving.gateway", "--config", str(tmp_path / "config.json")]
    environment = child_environment("serving") | {"SLIPWAY_FRONT_TOKEN_FILE": str(tmp_path / "token")}
    process = subprocess.Popen(command + [part for each in changes for part in ("--set", each)], env=environment, stderr=subprocess.PIPE)
    asked = httpx.Client(base_url=f"http://127.0.0.2:{port}", transport=httpx.HTTPTransport(retries=8))
    assert "no replica" in asked.get("/health").json()["error"]["message"]
    process.send_signal(signal.SIGTERM)
    while "is going" not in asked.get("/health").json()["error"]["message"]:
        pass
    assert process.communicate(timeout=20) == (None, b"")
    assert process.returncode == 0


def test_node_drain_waits_for_its_replicas_and_forgets_those_that_were_killed(tmp_path: Path) -> None:
    lives = Standing(tmp_path, "app#model#lives")
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / "killed.replica").write_text(str(killed.pid))
    assert not lives.must_drain
    assert drain(tmp_path, timeout_s=0.0) == 1
    assert lives.must_drain
    threading.Timer(0.3, lives.leave).start()
    assert drain(tmp_path, timeout_s=10.0) == 0


def test_bell_rings_with_the_token_and_not_again_at_once() -> None:
    rung: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rung.append((self.path, self.headers.get(TOKEN_HEADER)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with HTTPServer((HOST, 0), Handler) as server:
        server.timeout = 5
        ring = HttpBell(f"http://{HOST}:{server.server_port}/wake", TOKEN)
        ring()
        ring()
        server.handle_request()
        server.timeout = 0.2
        server.handle_request()
    assert rung == [("/wake", TOKEN)]


def test_gateway_rings_for_the_cheapest_pool_that_sleeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("SLIPWAY_FRONT_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("SLIPWAY_WAKE_URL", "http://head:8000/")
    sleeps = {"min_replicas": 0, "max_replicas": 2}
    pools = [
        {"name": "dear", "usd_per_hour": 2, "autoscale": sleeps},
        {"name": "cheap", "usd_per_hour": 1, "autoscale": sleeps},
        {"name": "up"},
    ]
    addresses = load_cluster_addresses()
    assert bell(config(serve={"pools": pools}), addresses)._url == "http://head:8000/wake/cheap"
    assert bell(config(serve={"autoscale": sleeps}), addresses)._url == "http://head:8000/wake"
    assert bell(config(), addresses)._url is None


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
