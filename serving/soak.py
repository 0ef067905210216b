"""`slipway bench soak`: a server at a steady share of its capacity for minutes; what its memory does, and what fails.

- Capacity is measured first, by closed-loop streams; then requests come at random moments (a Poisson process), whether or not the ones
  before are done, as users do.
- The load comes from a process of its own, whose share of a core is reported: near 1 it would be the load generator that is measured.
- The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from infra.contracts import verify
from infra.errors import SlipwayError
from infra.network import free_port
from serving.bench import ask_load_generator
from serving.bench_servers import Server, our_server
from serving.config import ServeConfig
from serving.load import prompt, quantile, request_body

STREAMS_FOR_CAPACITY = 32
NUM_TURNS = 5
"""Of which the best is the capacity: the first warms up, and a turn of seconds that the machine was slow in told a third of it."""
SAMPLE_S = 2.0
WARM_UP_SHARE = 0.2
"""Of the run, at its start, in which memory may still grow: caches fill."""


async def soak(model_dir: Path, minutes: float, share: float, num_tokens: int, cache_gb: float) -> dict[str, Any]:
    """The figures. Raises ArtifactError and TransientError as the server does."""
    verify(model_dir, ("quantized",))
    with our_server(model_dir, ServeConfig(port=free_port(), cache_gb=cache_gb)) as (server, _):
        capacity = max([(await ask_load_generator(server, STREAMS_FOR_CAPACITY, num_tokens))["tokens_per_s"] for _ in range(NUM_TURNS)])
        rate = share * capacity / num_tokens
        print(f"capacity {capacity:.0f} tokens/s; {rate:.2f} requests/s for {minutes:g} minutes", file=sys.stderr, flush=True)
        numbers = [str(rate), str(60 * minutes), str(num_tokens)]
        command = [sys.executable, "-m", "serving.soak", "--load", server.url, server.model_name, *numbers]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        samples = await _watch(server, process)
        assert process.stdout is not None
        told = json.loads(await process.stdout.read())
    steady = samples[int(WARM_UP_SHARE * len(samples)) :]
    slope = statistics.linear_regression([at_s / 60 for at_s, *_ in steady], [rss / (1 << 20) for _, rss, _ in steady]).slope
    return {
        **told,
        "capacity_tokens_per_s": capacity,
        "share": share,
        "rss_mb_per_minute": round(slope, 3),
        "rss_bytes": samples[-1][1],
        "engine_rss_bytes": samples[-1][2],
        "rss_mb_by_minute": [rss >> 20 for _, rss, _ in samples[:: round(60 / SAMPLE_S)]],
    }


async def _watch(server: Server, process: asyncio.subprocess.Process) -> list[tuple[float, int, int]]:
    """Seconds, and the memory in bytes of all the server's processes and of its engine's, until the load ends."""
    started_s, samples = time.monotonic(), []
    while process.returncode is None:
        samples.append((time.monotonic() - started_s, server.rss_bytes, server.engine_rss_bytes))
        done, _ = await asyncio.wait([asyncio.create_task(process.wait())], timeout=SAMPLE_S)
        if done:
            break
    return samples


async def load(url: str, model: str, rate: float, duration_s: float, num_tokens: int) -> dict[str, Any]:
    """Sends `rate` requests a second for `duration_s` and waits for their answers."""
    outcomes: Counter[str] = Counter()
    times_s: list[float] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        body = request_body(model, prompt(uuid.uuid4().hex, number), num_tokens)
        asked_s = time.perf_counter()
        try:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                text = await response.read()
            is_whole = response.status == 200 and text.endswith(b"data: [DONE]\n\n")
            outcomes["done" if is_whole else f"status {response.status}"] += 1
        except aiohttp.ClientError as error:
            outcomes[type(error).__name__] += 1
        times_s.append(time.perf_counter() - asked_s)

    started_s = next_s = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks: list[asyncio.Task[None]] = []
        while (next_s := next_s + random.expovariate(rate)) < started_s + duration_s:
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session, len(tasks))))
        await asyncio.gather(*tasks)
    elapsed_s = time.perf_counter() - started_s
    return {
        "num_requests": len(tasks),
        "num_failed": len(tasks) - outcomes["done"],
        "outcomes": dict(outcomes),
        "tokens_per_s": round(outcomes["done"] * num_tokens / elapsed_s, 1),
        "latency_p50_s": round(statistics.median(times_s), 3) if times_s else None,
        "latency_p99_s": round(quantile(times_s, 0.99), 3) if times_s else None,
        "load_generator_cpu_share": round(time.process_time() / elapsed_s, 3),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a quantized model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cache-gb", type=float, default=0.25, help="so large that the cache is full before the warm-up ends")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry with the other commands; JSON is always the last line")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        url, model, *numbers = given.load
        print(json.dumps(asyncio.run(load(url, model, float(numbers[0]), float(numbers[1]), int(numbers[2])))))
        return
    if given.model is None:
        parser.error("--model is needed")
    try:
        print(json.dumps(asyncio.run(soak(given.model, given.minutes, given.share, given.new_tokens, given.cache_gb))))
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
