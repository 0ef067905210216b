"""Several fronts before the same replicas, gateways that leave or ring, and a node that drains."""

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

from infra.errors import TransientError
from infra.network import free_port
from infra.settings import child_environment, load_cluster_addresses
from serving.announcement import TOKEN_HEADER, Announcement, FrontAddress, Place
from serving.bell import HttpBell
from serving.config import ServeConfig
from serving.fleet import Fleet
from serving.front.server import FrontServer
from serving.gateway import bell
from serving.node import Standing, drain
from serving.replica_http import FromFront, ReplicaServer
from tests.unit.test_serving_api import COMPLETION, make_api, scripted
from tests.unit.test_serving_cluster_config import TOKEN, config

HOST = "127.0.0.1"
BODY = {"model": "toy", "prompt": "hi"}


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
