"""A real Ray Serve that follows the load: the replicas are watched from beside it, by a driver of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from infra.settings import child_environment

WATCH = """
import json, sys, time
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="ERROR")
while True:
    (application,) = serve.status().applications.values()
    (deployment,) = application.deployments.values()
    print(json.dumps(deployment.replica_states), flush=True)
    time.sleep(0.1)
"""
PRESENT = ("STARTING", "RUNNING")
AUTOSCALE = {"min_replicas": 0, "max_replicas": 2, "down_delay_s": 3.0, "zero_delay_s": 3.0}


@asynccontextmanager
async def watching(server: Any) -> AsyncIterator[Process]:
    """A second driver in the server's Ray, which prints the states of the replicas."""
    (address,) = {part.partition("=")[2] for process in server.family() for part in process.cmdline() if part.startswith("--gcs-address=")}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WATCH, address, stdout=PIPE, env=child_environment())
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def seconds_until(watch: Process, is_true: Callable[[int, int], bool], timeout_s: float = 60.0) -> float:
    """How long it took until `is_true` of the replicas asked for and of those that answer."""
    assert watch.stdout is not None
    started_s = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while line := await watch.stdout.readline():
            states = json.loads(line)
            if is_true(sum(states.get(state, 0) for state in PRESENT), states.get("RUNNING", 0)):
                return time.monotonic() - started_s
    raise AssertionError("the watching driver ended")


@asynccontextmanager
async def streams(url: str, num_streams: int) -> AsyncIterator[None]:
    """So many clients, each with a request at any time, while the block runs."""
    body = {"model": "toy", "prompt": "lamp", "max_tokens": 200, "ignore_eos": True}

    async def ask(client: httpx.AsyncClient) -> None:
        while True:
            response = await client.post(f"{url}/v1/completions", json=body)
            assert response.status_code == 200, response.text

    async with httpx.AsyncClient(timeout=60) as client:
        tasks = [asyncio.create_task(ask(client)) for _ in range(num_streams)]
        try:
            yield
        finally:
            failed = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not failed, "no request may fail while replicas come"


@pytest.mark.slow
def test_server_burst_gets_a_second_replica_then_none_and_a_request_wakes_one(
    start_toy_server: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    server = start_toy_server(autoscale=AUTOSCALE)

    async def scene() -> dict[str, float]:
        times_s = {}
        async with watching(server) as watch:
            async with streams(server.url, 1):
                await seconds_until(watch, lambda asked, running: asked == running == 1)
                await asyncio.sleep(4)
                assert await seconds_until(watch, lambda asked, running: asked == 1, 1.0) < 1
                async with streams(server.url, 31):
                    times_s["asked"] = await seconds_until(watch, lambda asked, running: asked == 2)
                    times_s["came"] = await seconds_until(watch, lambda asked, running: running == 2)
                times_s["went"] = await seconds_until(watch, lambda asked, running: asked == 1)
            times_s["zero"] = await seconds_until(watch, lambda asked, running: asked == 0)
            started_s = time.monotonic()
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{server.url}/v1/completions", json={"model": "toy", "prompt": "lamp", "max_tokens": 2})
            assert answer.status_code == 200
            times_s["woke"] = time.monotonic() - started_s
        return times_s

    try:
        server.wait_ready()
        times_s = asyncio.run(scene())
    finally:
        assert server.stop() == 0
    for name, value in times_s.items():
        record_property(f"{name}_s", round(value, 2))
    print("seconds:", {name: round(value, 2) for name, value in times_s.items()})
    assert times_s["asked"] < 20, "by Ray's own defaults it would take 30 s or more"
    assert times_s["went"] >= AUTOSCALE["down_delay_s"] - 1
    assert times_s["zero"] >= AUTOSCALE["zero_delay_s"] - 1
