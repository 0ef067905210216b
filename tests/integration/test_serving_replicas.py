"""Two real replicas behind one address, and what clients see when one of them is killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

BODY = {"model": "toy", "prompt": "lamp", "max_tokens": 100, "ignore_eos": True}
NUM_CLIENTS = 12


def made_by_replica(url: str) -> dict[str, float]:
    """Tokens made, by replica, from one scrape."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    found = [family for family in families if family.name == "vllm:generation_tokens"]
    return {sample.labels["replica"]: sample.value for family in found for sample in family.samples if sample.name.endswith("_total")}


def wait_for_two(url: str) -> None:
    deadline_s = time.monotonic() + 90
    while len(made_by_replica(url)) < 2:
        assert time.monotonic() < deadline_s, "two replicas are not there in time"
        time.sleep(0.1)


def find(server: Any, word: str) -> list[psutil.Process]:
    """Living processes of the server by a word of their command."""
    living = [process for process in server.family() if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in living if word in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def server(start_toy_server: Callable[..., Any]) -> Iterator[Any]:
    running = start_toy_server(num_replicas=2)
    try:
        running.wait_ready()
        wait_for_two(running.url)
        yield running
    finally:
        running.stop()


def test_metrics_any_replica_answers_for_both(server: Any) -> None:
    for number in range(20):
        assert httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": f"{number}", "max_tokens": 4}).status_code == 200
    scrapes = [made_by_replica(server.url) for _ in range(6)]
    assert all(scrape == scrapes[0] for scrape in scrapes)
    assert sum(scrapes[0].values()) == 80
    assert len(scrapes[0]) == 2


@pytest.mark.parametrize("victim", ["ServeReplica", "openvino_steps"])
def test_replica_killed_under_load_costs_no_answer_and_ends_its_streams_with_an_error(server: Any, victim: str) -> None:
    wait_for_two(server.url)
    killed: list[float] = []

    async def whole(client: httpx.AsyncClient, number: int) -> list[int]:
        statuses = []
        while not killed or time.monotonic() < killed[0] + 1.0:
            statuses.append((await client.post("/v1/completions", json={**BODY, "prompt": f"{number} {len(statuses)}"})).status_code)
        return statuses

    async def streamed(client: httpx.AsyncClient, number: int) -> list[str]:
        ends = []
        while not killed or time.monotonic() < killed[0] + 1.0:
            async with client.stream("POST", "/v1/completions", json={**BODY, "prompt": f"{number} {len(ends)}", "stream": True}) as answer:
                assert answer.status_code == 200
                ends.append((await answer.aread()).decode().rsplit("data: ", 1)[1].strip())
        return ends

    async def scene() -> tuple[list[int], list[str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            clients = [asyncio.create_task(whole(client, number)) for number in range(NUM_CLIENTS)]
            streams = [asyncio.create_task(streamed(client, NUM_CLIENTS + number)) for number in range(NUM_CLIENTS)]
            await asyncio.sleep(1.0)
            find(server, victim)[0].kill()
            killed.append(time.monotonic())
            return [*chain(*await asyncio.gather(*clients))], [*chain(*await asyncio.gather(*streams))]

    statuses, ends = asyncio.run(scene())
    assert set(statuses) == {200}
    errors = [json.loads(end)["error"] for end in ends if end != "[DONE]"]
    assert len(errors) <= NUM_CLIENTS, "one replica only was lost, and once"
    assert all(error["type"] == "server_error" for error in errors)


def test_drain_under_load_finishes_every_stream_and_refuses_the_rest(start_toy_server: Callable[..., Any]) -> None:
    server = start_toy_server()
    server.wait_ready()
    url = server.url

    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {**BODY, "prompt": f"{number}", "max_tokens": 230, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            return (await answer.aread()).decode()

    async def scene() -> tuple[list[str], int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            running = [asyncio.create_task(one(client, number)) for number in range(24)]
            while 'vllm:num_requests_running{model_name="toy"' not in (text := (await client.get("/metrics")).text) or " 0.0" in next(
                line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")
            ):
                await asyncio.sleep(0.01)
            server.process.terminate()
            while (refused := await client.post("/v1/completions", json={**BODY, "max_tokens": 1})).status_code == 200:
                await asyncio.sleep(0.01)
            return await asyncio.gather(*running), refused.status_code

    texts, status = asyncio.run(scene())
    assert status == 503
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0


@pytest.mark.slow
def test_pools_of_two_engines_serve_one_model_and_spill_over(start_toy_server: Callable[..., Any], toy_base: Any) -> None:
    pools = [  # each of one place, so that prices compare
        {"name": "cpu", "usd_per_hour": 0.1},
        {"name": "reference", "usd_per_hour": 1.0, "engine": "torch", "model_dir": str(toy_base)},
    ]
    server = start_toy_server(pools=[{**pool, "cpus_per_replica": 1, "max_running_requests": 1} for pool in pools])

    async def scene() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            asked = [client.post("/v1/completions", json={**BODY, "prompt": f"{number}", "max_tokens": 230}) for number in range(24)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    try:
        server.wait_ready()
        wait_for_two(server.url)
        for number in range(4):
            assert httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": f"{number}", "max_tokens": 4}).status_code == 200
        assert sorted(made_by_replica(server.url).values()) == [0, 16], "one at a time all go to the cheaper pool"
        assert set(asyncio.run(scene())) == {200}
        assert min(made_by_replica(server.url).values()) > 0, "what it has no place for goes to the other"
    finally:
        server.stop()
