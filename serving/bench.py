"""Measures serving: the bare engine, the same engine behind our HTTP server, and other servers, in turns, in one run.

- The bare engine is the library's pipeline stepped in this process, with no event loop; servers and clients are processes of their own.
- All take turns, so that what else the machine does hits each; a ratio is one of medians.
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
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.chat import ChatCodec, load_codec
from infra.contracts import verify
from infra.errors import ConfigError, SlipwayError, TransientError
from infra.network import free_port
from infra.settings import child_environment
from serving.bench_servers import Server, our_server, peer_server
from serving.config import ServeConfig
from serving.engines.base import Sampling
from serving.engines.openvino_steps import Batch, load
from serving.load import prompt

NUM_ONE_TOKEN = 40
VARIANT = "variant"
WARM_UP = (4, 16)
"""Streams and tokens of the turn that nobody counts: the first steps of a shape are compiled."""


async def bench(given: argparse.Namespace) -> dict[str, Any]:
    """The figures, in seconds and tokens/s. Raises ArtifactError, ConfigError and TransientError as the servers do."""
    verify(given.model, ("quantized",))
    models = {name: _peer_model(name, python, given) for name, python in given.peer}
    limits = ServeConfig(port=free_port())
    num_threads = os.cpu_count() or 1
    with ExitStack() as servers:
        ours, started_s = servers.enter_context(our_server(given.model, limits))
        peers = {
            name: servers.enter_context(peer_server(name, python, models[name], max(given.streams), num_threads))
            for name, python in given.peer
        }
        if given.variant:
            peers[VARIANT], _ = servers.enter_context(our_server(given.model, given.variant.model_copy(update={"port": free_port()})))
        codec = load_codec(given.model)
        batch = Batch(load(str(given.model), limits.max_running_requests, limits.cache_gb, num_threads))
        await _turn(batch, codec, ours, peers, *WARM_UP)
        turns = {n: [await _turn(batch, codec, ours, peers, n, given.new_tokens) for _ in range(given.rounds)] for n in given.streams}
        one_token = {"engine_one_token_p50_s": _engine_one_token(batch, codec), **await ask_load_generator(ours, NUM_ONE_TOKEN, 1)}
        rss_bytes, cold_start_s = ours.replica_rss_bytes, ours.replica_start_s
    return {
        "streams": {str(n): _summary(results) for n, results in turns.items()},
        "peers": {name: {str(n): _peer_ratio(results, name) for n, results in turns.items()} for name in peers if name != VARIANT},
        "variant": {str(n): round(1 / _peer_ratio(results, VARIANT), 3) for n, results in turns.items()} if given.variant else {},
        **one_token,
        "cold_start_s": cold_start_s,
        "server_started_s": started_s,
        "replica_rss_bytes": rss_bytes,
    }


def _peer_model(name: str, python: Path, given: argparse.Namespace) -> Path:
    """What the peer serves. Raises ConfigError where that, or the peer, is not there."""
    if not python.exists():
        raise ConfigError(f"--peer {name}={python}: no such file. A Python that has {name} installed is needed.")
    model: Path | None = given.peer_gguf if name == "llama.cpp" else given.peer_model
    if model is None or not model.exists():
        option = "--peer-gguf FILE" if name == "llama.cpp" else "--peer-model FOLDER"
        raise ConfigError(f"{option} is needed for {name}: the same base model in the form that it reads.")
    return model


async def _turn(
    batch: Batch, codec: ChatCodec, ours: Server, peers: dict[str, Server], num_streams: int, num_tokens: int
) -> dict[str, dict[str, float]]:
    """One measurement of each, with the same prompts: the bare engine first, then our server, then the others."""
    nonce = uuid.uuid4().hex
    figures = {"engine": _engine(batch, codec, [prompt(nonce, index) for index in range(num_streams)], num_tokens)}
    engine_before_s, other_before_s = ours.cpu_s
    figures["ours"] = await ask_load_generator(ours, num_streams, num_tokens, nonce)
    engine_after_s, other_after_s = ours.cpu_s
    figures["ours"]["cpu_outside_engine_share"] = (other_after_s - other_before_s) / max(engine_after_s - engine_before_s, 1e-3)
    for name, peer in peers.items():
        figures[name] = await ask_load_generator(peer, num_streams, num_tokens, nonce)
    shown = ", ".join(f"{name} {each['tokens_per_s']:.1f}" for name, each in figures.items())
    print(f"{num_streams:3d} streams, tokens/s: {shown}", file=sys.stderr, flush=True)
    return figures


def _engine(batch: Batch, codec: ChatCodec, prompts: list[str], num_tokens: int) -> dict[str, float]:
    """Answers all prompts together; a first token is one that can be read, as it is to the server's clients."""
    asked = [codec.encode_text(text) for text in prompts]
    arrivals: dict[int, list[tuple[float, list[int]]]] = {number: [] for number in range(len(asked))}
    started_s = time.perf_counter()
    for number, ids in enumerate(asked):
        batch.add(number, ids, Sampling(max_tokens=num_tokens))
    while batch.has_work:
        news = batch.step()
        now_s = time.perf_counter()
        for number, ids, *_ in news:
            arrivals[number].append((now_s, ids))
    elapsed_s = time.perf_counter() - started_s
    num_made = sum(len(ids) for parts in arrivals.values() for _, ids in parts)
    firsts_s = [first_text_s(parts, codec) - started_s for parts in arrivals.values()]
    return {"tokens_per_s": num_made / elapsed_s, "ttft_p50_s": statistics.median(firsts_s)}


def first_text_s(parts: list[tuple[float, list[int]]], codec: ChatCodec) -> float:
    """When an answer first had text; its end, where it has none. Models begin off their subject with tokens that no text stands for."""
    decoder = codec.stream_decoder()
    return next((at_s for at_s, ids in parts if "".join(map(decoder.feed, ids))), parts[-1][0])


def _engine_one_token(batch: Batch, codec: ChatCodec) -> float:
    times_s = []
    for index in range(NUM_ONE_TOKEN):
        started_s = time.perf_counter()
        _engine(batch, codec, [prompt("again", index % 4)], 1)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s)


async def ask_load_generator(server: Server, num_streams: int, num_tokens: int, *nonce: str) -> dict[str, float]:
    """What the load generator, in its own process, measured. Raises TransientError when it fails."""
    command = [sys.executable, "-m", "serving.load", server.url, server.model_name, str(num_streams), str(num_tokens), *nonce]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=child_environment("serving"))
    output, _ = await process.communicate()
    if process.returncode:
        raise TransientError(f"the load generator ended with exit code {process.returncode}. Run the benchmark again.")
    return dict(json.loads(output))


def _summary(turns: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians over the turns, and how far the ratio of one turn went."""
    engine = {key: statistics.median(turn["engine"][key] for turn in turns) for key in turns[0]["engine"]}
    ours = {key: statistics.median(turn["ours"][key] for turn in turns) for key in turns[0]["ours"]}
    ratios = [turn["ours"]["tokens_per_s"] / turn["engine"]["tokens_per_s"] for turn in turns]
    added_s = statistics.median(turn["ours"]["ttft_p50_s"] - turn["engine"]["ttft_p50_s"] for turn in turns)
    return {
        "tokens_per_s": round(ours["tokens_per_s"], 1),
        "engine_tokens_per_s": round(engine["tokens_per_s"], 1),
        "ratio_to_engine": round(ours["tokens_per_s"] / engine["tokens_per_s"], 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "added_ttft_p50_ms": round(1e3 * added_s, 2),
        **{name.replace("_s", "_ms"): round(1e3 * ours[name], 2) for name in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")},
        **{name: round(ours[name], 3) for name in ("tokens_per_event", "cpu_outside_engine_share", "load_generator_cpu_share")},
    }


def _peer_ratio(turns: list[dict[str, dict[str, float]]], name: str) -> float:
    """Our tokens/s over a peer's."""
    ours, peer = (statistics.median(turn[each]["tokens_per_s"] for turn in turns) for each in ("ours", name))
    return round(ours / peer, 3)


def _named_python(text: str) -> tuple[str, Path]:
    name, separator, python = text.partition("=")
    if name not in ("llama.cpp", "vllm") or not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: llama.cpp=PYTHON or vllm=PYTHON is needed")
    return name, Path(python)


def _serve_config(text: str) -> ServeConfig:
    try:
        return ServeConfig.model_validate_json(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text}: the fields of `serve` as JSON are needed: {error}") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a quantized model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=_named_python, action="append", default=[], help="llama.cpp=PYTHON or vllm=PYTHON; may be repeated")
    parser.add_argument("--peer-gguf", type=Path, help="the same base model as a GGUF file, for llama.cpp, which takes it to 8 bits")
    parser.add_argument("--peer-model", type=Path, help="the same base model as a folder, for vllm, which takes it in bfloat16")
    parser.add_argument("--variant", type=_serve_config, help="fields of `serve` as JSON: a second server of ours, compared with the first")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry with the other commands; JSON is always the last line")
    given = parser.parse_args()
    try:
        figures = asyncio.run(bench(given))
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
