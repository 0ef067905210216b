"""Measures serving: the bare engine against the same engine behind HTTP, in turns, in one run.

- The bare engine is the library's pipeline stepped in this process, with no event loop; server and clients are processes of their own.
- The two take turns, so that what else the machine does hits both; the ratio is of the medians.
- The last line on stdout is one JSON object; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.chat import ChatCodec, load_codec
from infra.contracts import verify
from infra.errors import SlipwayError, TransientError
from infra.files import read_json, write_json_atomic
from infra.settings import child_environment
from serving.app import READY_NAME
from serving.config import ServeConfig, ServeJob
from serving.engines.base import Sampling
from serving.engines.openvino_steps import Batch, load
from serving.load import prompt

MODEL_NAME = "bench"
NUM_ONE_TOKEN = 40


async def bench(model_dir: Path, streams: list[int], num_tokens: int, num_rounds: int, port: int) -> dict[str, Any]:
    """The figures of `model_dir`; seconds and tokens/s. Raises ArtifactError, ConfigError and TransientError as the server does."""
    verify(model_dir, ("quantized",))
    limits = ServeConfig(port=port)
    codec = load_codec(model_dir)
    with _server(model_dir, limits) as (url, started_s):
        batch = Batch(load(str(model_dir), limits.max_running_requests, limits.cache_gb, os.cpu_count()))
        await _both(batch, codec, url, 4, 16)  # warms both: the first steps of a shape are compiled
        rounds = {n: [await _both(batch, codec, url, n, num_tokens) for _ in range(num_rounds)] for n in streams}
        one_token = {"engine_one_token_p50_s": _engine_one_token(batch, codec), **await _load(url, NUM_ONE_TOKEN, 1)}
    return {"streams": {str(n): _summary(results) for n, results in rounds.items()}, **one_token, "server_started_s": started_s}


async def _both(batch: Batch, codec: ChatCodec, url: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """One turn each."""
    nonce = uuid.uuid4().hex
    started_s = time.perf_counter()
    num_made = _engine_tokens(batch, [codec.encode_text(prompt(nonce, index)) for index in range(num_streams)], num_tokens)
    bare = num_made / (time.perf_counter() - started_s)
    figures = {"engine_tokens_per_s": bare, **await _load(url, num_streams, num_tokens)}
    print(f"{num_streams:3d} streams: engine {bare:7.1f} tokens/s, HTTP {figures['tokens_per_s']:7.1f}", file=sys.stderr, flush=True)
    return figures


def _engine_one_token(batch: Batch, codec: ChatCodec) -> float:
    times_s = []
    for index in range(NUM_ONE_TOKEN):
        started_s = time.perf_counter()
        _engine_tokens(batch, [codec.encode_text(prompt("again", index % 4))], 1)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s)


def _engine_tokens(batch: Batch, prompts: list[list[int]], num_tokens: int) -> int:
    """Answers all prompts together; the number of tokens made."""
    num_made = 0
    for number, ids in enumerate(prompts):
        batch.add(number, ids, Sampling(max_tokens=num_tokens))
    while batch.has_work:
        num_made += sum(len(ids) for _, ids, *_ in batch.step())
    return num_made


async def _load(url: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """What the load generator, in its own process, measured. Raises TransientError when it fails."""
    command = [sys.executable, "-m", "serving.load", url, MODEL_NAME, str(num_streams), str(num_tokens)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=child_environment())
    output, _ = await process.communicate()
    if process.returncode:
        raise TransientError(f"the load generator ended with exit code {process.returncode}. Run the benchmark again.")
    return dict(json.loads(output))


def _summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds, and how far the ratio of one round went."""
    median = {key: statistics.median(result[key] for result in results) for key in results[0]}
    ratios = [result["tokens_per_s"] / result["engine_tokens_per_s"] for result in results]
    return {
        "engine_tokens_per_s": round(median["engine_tokens_per_s"], 1),
        "http_tokens_per_s": round(median["tokens_per_s"], 1),
        "ratio": round(median["tokens_per_s"] / median["engine_tokens_per_s"], 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "ttft_p50_s": round(median["ttft_p50_s"], 4),
        "ttft_p95_s": round(median["ttft_p95_s"], 4),
        "events_per_stream": round(median["events_per_stream"], 1),
    }


@contextmanager
def _server(model_dir: Path, limits: ServeConfig) -> Iterator[tuple[str, float]]:
    """A real server's URL and start-up time in seconds; the server ends with the block. Raises TransientError when it does not start."""
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as folder:
        job = ServeJob(output_dir=Path(folder) / "server", model_dir=model_dir.absolute(), model_name=MODEL_NAME, serve=limits)
        config = Path(folder) / "serve.json"
        write_json_atomic(config, job.model_dump(mode="json"))
        process = subprocess.Popen([sys.executable, "-m", "serving.app", "--config", str(config)], env=child_environment())
        try:
            ready_file = job.output_dir / READY_NAME
            while not ready_file.is_file():
                if process.poll() is not None:
                    raise TransientError(f"the server ended with exit code {process.returncode} before it was ready; its text is above.")
                time.sleep(0.05)
            ready = read_json(ready_file)
            yield ready["url"], ready["started_s"]
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=bench.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a quantized model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--json", action="store_true", help="accepted for symmetry with the other commands; JSON is always the last line")
    given = parser.parse_args()
    try:
        figures = asyncio.run(bench(given.model, given.streams, given.new_tokens, given.rounds, given.port))
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
