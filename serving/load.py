"""A closed-loop load generator: N clients, each with one stream at a time, as `python -m serving.load URL MODEL STREAMS TOKENS`.

It runs in a process of its own, so that its work is never counted as the server's, and prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Stream:
    """What one client saw."""

    first_s: float
    """From sending the request to the first event."""
    total_s: float
    num_tokens: int
    num_events: int


def prompt(nonce: str, index: int) -> str:
    """A prompt that no cache has seen: the nonce comes first."""
    return f"{nonce} {index}: tell me a long story about a harbour, a ship and the people who built it."


async def run_streams(url: str, model: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """`num_streams` streams of `num_tokens` tokens each at once; tokens/s over all of them and times to the first token in seconds."""
    nonce = uuid.uuid4().hex
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        started_s = time.perf_counter()
        bodies = [_body(model, prompt(nonce, index), num_tokens) for index in range(num_streams)]
        streams = await asyncio.gather(*(_stream(session, url, body) for body in bodies))
        elapsed_s = time.perf_counter() - started_s
    firsts_s = sorted(stream.first_s for stream in streams)
    return {
        "tokens_per_s": sum(stream.num_tokens for stream in streams) / elapsed_s,
        "num_tokens": sum(stream.num_tokens for stream in streams),
        "events_per_stream": statistics.mean(stream.num_events for stream in streams),
        "ttft_p50_s": statistics.median(firsts_s),
        "ttft_p95_s": firsts_s[min(len(firsts_s) - 1, int(0.95 * len(firsts_s)))],
    }


async def run_one_token(url: str, model: str, num_requests: int) -> dict[str, Any]:
    """Latency in seconds of requests for one token, one after the other."""
    times_s = []
    async with aiohttp.ClientSession() as session:
        for index in range(num_requests):
            body = {**_body(model, prompt("again", index % 4), 1), "stream": False, "stream_options": None}
            started_s = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                await response.read()
            times_s.append(time.perf_counter() - started_s)
    return {"one_token_p50_s": statistics.median(times_s)}


def _body(model: str, text: str, num_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": text,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Stream:
    started_s = time.perf_counter()
    first_s, parts = 0.0, []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for part in response.content.iter_any():
            first_s = first_s or time.perf_counter() - started_s
            parts.append(part)
    total_s = time.perf_counter() - started_s
    events = [event for event in b"".join(parts).split(b"\n\n") if event]
    usage = json.loads(events[-2].removeprefix(b"data: "))["usage"]
    return Stream(first_s, total_s, usage["completion_tokens"], len(events) - 2)


def main(arguments: list[str]) -> None:
    """Runs the streams, or one-token requests where TOKENS is 1, and prints the figures."""
    url, model, num_streams, num_tokens = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    run = run_one_token(url, model, num_streams) if num_tokens == 1 else run_streams(url, model, num_streams, num_tokens)
    print(json.dumps(asyncio.run(run)))


if __name__ == "__main__":
    main(sys.argv[1:])
