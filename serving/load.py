"""A closed-loop load generator: N clients, each with one stream at a time, as `python -m serving.load URL MODEL STREAMS TOKENS [NONCE]`.

It runs in a process of its own, so that its work is never counted as the server's, and prints one JSON object. Any server of the OpenAI
API can be asked. Its prompts begin with NONCE, or with one of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop

from infra.settings import load_settings


@dataclass(frozen=True)
class Stream:
    """What one client saw."""

    first_s: float
    """From sending the request to the first event."""
    gaps_s: Sequence[float]
    """Between one arrival and the next."""
    num_tokens: int
    num_events: int


def prompt(nonce: str, index: int) -> str:
    """A prompt that no cache has seen: the nonce comes first."""
    return f"{nonce} {index}: tell me a long story about a harbour, a ship and the people who built it."


async def run_streams(url: str, model: str, num_streams: int, num_tokens: int, nonce: str) -> dict[str, Any]:
    """`num_streams` streams of `num_tokens` tokens each at once; tokens/s over all of them, times in seconds."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=_headers()) as session:
        await asyncio.gather(*(_connect(session, url) for _ in range(num_streams)))
        bodies = [request_body(model, prompt(nonce, index), num_tokens) for index in range(num_streams)]
        started_s, used_s = time.perf_counter(), time.process_time()
        streams = await asyncio.gather(*(_stream(session, url, body) for body in bodies))
        elapsed_s = time.perf_counter() - started_s
    num_made = sum(stream.num_tokens for stream in streams)
    firsts_s, gaps_s = [stream.first_s for stream in streams], [gap for stream in streams for gap in stream.gaps_s]
    return {
        "tokens_per_s": num_made / elapsed_s,
        "tokens_per_event": num_made / sum(stream.num_events for stream in streams),
        "ttft_p50_s": statistics.median(firsts_s),
        "ttft_p99_s": quantile(firsts_s, 0.99),
        "itl_p50_s": quantile(gaps_s, 0.5),
        "itl_p99_s": quantile(gaps_s, 0.99),
        "load_generator_cpu_share": (time.process_time() - used_s) / elapsed_s,
    }


async def run_one_token(url: str, model: str, num_requests: int) -> dict[str, Any]:
    """Latency in seconds of requests for one token, one after the other."""
    times_s = []
    async with aiohttp.ClientSession(headers=_headers()) as session:
        for index in range(num_requests):
            body = {**request_body(model, prompt("again", index % 4), 1), "stream": False}
            body.pop("stream_options")
            started_s = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                await response.read()
            times_s.append(time.perf_counter() - started_s)
    return {"one_token_p50_s": statistics.median(times_s)}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 of none, as the gaps of streams that came at once."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def request_body(model: str, text: str, num_tokens: int) -> dict[str, Any]:
    """A greedy streamed completion of exactly so many tokens."""
    return {
        "model": model,
        "prompt": text,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _headers() -> dict[str, str]:
    key = load_settings().api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


async def _connect(session: aiohttp.ClientSession, url: str) -> None:
    """Leaves a connection that a stream then finds, as clients have one; a process's first request took 4 ms more than the next."""
    async with session.get(f"{url}/v1/models") as response:
        await response.read()


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Stream:
    arrivals_s, parts = [time.perf_counter()], []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for part in response.content.iter_any():
            arrivals_s.append(time.perf_counter())
            parts.append(part)
    events = [event for event in b"".join(parts).split(b"\n\n") if event.strip()]
    usage = json.loads(events[-2].removeprefix(b"data: "))["usage"]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]
    return Stream(gaps_s[0], gaps_s[1:], usage["completion_tokens"], len(events) - 2)


def main(arguments: list[str]) -> None:
    """Runs the streams, or one-token requests where TOKENS is 1, and prints the figures."""
    url, model, num_streams, num_tokens = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    nonce = arguments[4] if len(arguments) > 4 else uuid.uuid4().hex
    run = run_one_token(url, model, num_streams) if num_tokens == 1 else run_streams(url, model, num_streams, num_tokens, nonce)
    print(json.dumps(uvloop.run(run)))  # takes less of the cores that the server shares


if __name__ == "__main__":
    main(sys.argv[1:])
