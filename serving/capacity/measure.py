"""Measures what one replica of a running server can do, as a curve for `slipway plan --curve FILE`.

Any server of the OpenAI API is asked: its rates by number of streams, by the load generator in a process of its own; how fast it reads
prompts, from the difference between short and long ones that no cache holds; and of ours, how long its replica took to start. The server
must have one replica, and a quiet machine, or a node as full as it will be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import yaml

from infra.config import parse
from infra.errors import EXIT_DONE, ConfigError, SlipwayError, TransientError
from infra.files import write_text_atomic
from infra.settings import child_environment, load_settings
from serving.capacity.curves import Curve

STREAMS = (1, 4, 16, 32)
NUM_TOKENS = 128
NUM_ROUNDS = 3
NUM_PROMPTS = 8
SHORT_WORDS, LONG_WORDS = 8, 400
WORDS = ["harbour", "ship", "mast", "anchor", "keel", "rope", "tide", "crew", "cargo", "pilot"]
ANSWER_S = 600.0
LOOK_S = 10.0
MESSAGE_BYTES = 500
START_METRIC = "slipway_replica_start_seconds{"


def measure(given: argparse.Namespace) -> Curve:
    """The curve. Raises ConfigError where no server answers there, TransientError where one fails while it is measured."""
    model = given.model or _model_of(given.url)
    rates = {}
    for num_streams in given.streams:
        rates[num_streams] = round(statistics.median(_rate(given.url, model, num_streams, given.tokens) for _ in range(given.rounds)), 1)
        print(f"{num_streams:4d} streams: {rates[num_streams]} tokens/s", file=sys.stderr, flush=True)
    prompt_rate = round(_prompt_rate(given.url, model, given.prompt_words))
    print(f"prompts: {prompt_rate} tokens/s", file=sys.stderr, flush=True)
    known = {
        "engine": given.engine,
        "model": model,
        "hardware": given.hardware,
        "source": f"measured by `slipway bench curve` on {time.strftime('%Y-%m-%d')}: {given.tokens} new tokens a stream, greedy",
        "cpus_per_replica": given.cpus_per_replica,
        "gpus_per_replica": given.gpus_per_replica,
        "tokens_per_s": rates,
        "prompt_tokens_per_s": prompt_rate,
        "cold_start_s": given.cold_start_s or _start_s(given.url),
        "max_running_requests": given.max_running_requests,
        "node": given.node,
    }
    return parse(Curve, known, "what was measured")


def _rate(url: str, model: str, num_streams: int, num_tokens: int) -> float:
    """Tokens/s of all streams together."""
    command = [sys.executable, "-m", "serving.load", url, model, str(num_streams), str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment("serving"), check=False)
    if done.returncode:
        raise TransientError(
            f"the load generator ended with exit code {done.returncode}: {done.stderr[-500:]}. Look at the server, and repeat."
        )
    return float(json.loads(done.stdout)["tokens_per_s"])


def _prompt_rate(url: str, model: str, num_words: int) -> float:
    """Prompt tokens/s: what a long prompt has more than a short one, over the time that it takes more; of several, the median."""
    rates = []
    for _ in range(NUM_PROMPTS):
        (short_tokens, short_s), (long_tokens, long_s) = (_one_token(url, model, words) for words in (SHORT_WORDS, num_words))
        rates.append((long_tokens - short_tokens) / max(long_s - short_s, 1e-6))
    return statistics.median(rates)


def _one_token(url: str, model: str, num_words: int) -> tuple[int, float]:
    """The tokens of a prompt that nobody has seen, and the seconds until its one token was there."""
    nonce = uuid.uuid4().hex  # first, so that no cache holds a beginning of it
    text = " ".join([nonce, *(WORDS[index % len(WORDS)] for index in range(num_words))])
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    started_s = time.perf_counter()
    answer = _ask(f"{url}/v1/completions", body)
    return int(answer["usage"]["prompt_tokens"]), time.perf_counter() - started_s


def _model_of(url: str) -> str:
    return str(_ask(f"{url}/v1/models")["data"][0]["id"])


def _start_s(url: str) -> float | None:
    """How long the server's replica took to start; None where it does not tell."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=LOOK_S) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, OSError):
        return None
    return max((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(START_METRIC)), default=None)


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if key := load_settings().api_key:
        headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return dict(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        said = error.read(MESSAGE_BYTES).decode(errors="replace")
        raise ConfigError(
            f"{url}: {error}: {said}. Set SLIPWAY_API_KEY where it asks for a key, and fewer --prompt-words where its context is short."
        ) from error
    except (urllib.error.URLError, OSError) as error:
        raise ConfigError(f"{url}: {error}. A server of the OpenAI API is needed there.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slipway bench curve", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is")
    parser.add_argument("--output", type=Path, required=True, help="file to write the curve to, .yaml")
    parser.add_argument("--model", help="the name to ask for; absent: the server's first")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="numbers of streams, 1 among them")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="new tokens of each stream")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="times that each is measured; the median counts")
    parser.add_argument(
        "--prompt-words", type=int, default=LONG_WORDS, help="words of the long prompts; as many as the context has room for"
    )
    parser.add_argument("--engine", default="openvino", help="what the curve calls the engine")
    parser.add_argument("--hardware", default="not told", help="what the curve calls the machine")
    fields = Curve.model_fields
    parser.add_argument("--cpus-per-replica", type=float, required=True, help=fields["cpus_per_replica"].description)
    parser.add_argument("--gpus-per-replica", type=int, default=0, help="GPUs of it")
    parser.add_argument("--max-running-requests", type=int, default=64, help=fields["max_running_requests"].description)
    parser.add_argument("--cold-start-s", type=float, help=fields["cold_start_s"].description)
    parser.add_argument("--node", default="cpu-16", help=fields["node"].description)
    return parser


def main() -> int:
    """The command line: writes the file, and prints it."""
    given = _parser().parse_args()
    try:
        curve = measure(given)
    except SlipwayError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    text = yaml.safe_dump(curve.model_dump(exclude_none=True), sort_keys=False)
    write_text_atomic(given.output, text)
    print(text, end="")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
