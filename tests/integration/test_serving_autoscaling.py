"""A real Ray Serve that follows the load: the replicas are watched by a thread of the server itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

WATCHED_SERVER = """
import json, threading, time
from infra.process import run_program
from serving.app import run
from serving.config import ServeJob

def watch(ready_file):
    while not ready_file.is_file():
        time.sleep(0.1)
    from ray import serve
    while True:
        for application in serve.status().applications.values():
            for deployment in application.deployments.values():
                print(json.dumps(deployment.replica_states), flush=True)
        time.sleep(0.1)

def run_watched(job):
    threading.Thread(target=watch, args=[job.output_dir / "serving.json"], daemon=True).start()
    run(job)

run_program(ServeJob, run_watched)
"""
READER = ThreadPoolExecutor(1)  # a look that timed out goes on reading: a second thread beside it would be given half a line
AUTOSCALE = {"min_replicas": 0, "max_replicas": 2, "down_delay_s": 3.0, "zero_delay_s": 3.0}


class Replicas(Counter[str]):
    """How many there are, by state."""

    @property
    def num_asked(self) -> int:
        return self["STARTING"] + self["RUNNING"]


async def seconds_until(server: Any, is_true: Callable[[Replicas], bool], timeout_s: float = 60.0) -> float:
    """How long it took until `is_true` of the replicas."""
    started_s = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while line := await asyncio.get_running_loop().run_in_executor(READER, server.process.stdout.readline):
            if is_true(Replicas(json.loads(line))):
                return time.monotonic() - started_s
    raise AssertionError("the server ended")


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
            failed = [task.exception() for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not failed, "no request may fail while replicas come and go"


@pytest.mark.slow
def test_server_burst_gets_a_second_replica_then_none_and_a_request_wakes_one(
    start_toy_server: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    # A server that is told to stop gives its answers no time at all; a replica that only is one too many must not do so.
    server = start_toy_server(program=("-c", WATCHED_SERVER), autoscale=AUTOSCALE, drain_timeout_s=0.0)

    async def scene() -> dict[str, float]:
        times_s = {}
        async with streams(server.url, 1):
            await seconds_until(server, lambda replicas: replicas["RUNNING"] == 1)
            with pytest.raises(TimeoutError):
                await seconds_until(server, lambda replicas: replicas.num_asked != 1, 4.0)
            async with streams(server.url, 31):
                times_s["asked"] = await seconds_until(server, lambda replicas: replicas.num_asked == 2)
                times_s["came"] = await seconds_until(server, lambda replicas: replicas["RUNNING"] == 2)
        async with streams(server.url, 6):  # the one that goes will be answering some of these
            times_s["went"] = await seconds_until(server, lambda replicas: replicas.num_asked == 1)
            await seconds_until(server, lambda replicas: replicas.total() == 1)
        times_s["zero"] = await seconds_until(server, lambda replicas: replicas.num_asked == 0)
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
