"""The benchmark's own output: what people's scripts read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.chat import load_codec
from serving.bench import first_text_s


def run(module: str, *options: str) -> Any:
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_bench_serve_compares_the_engine_and_its_server(toy_quantized: Path) -> None:
    options = ["--json", "--model", str(toy_quantized), "--streams", "1", "4", "--rounds", "1", "--new-tokens", "16"]
    options += ["--variant", '{"speculative": {"kind": "prompt_lookup"}}']
    figures = run("serving.bench", *options)
    assert set(figures["streams"]) == {"1", "4"}
    four = figures["streams"]["4"]
    assert four["ratio_to_engine"] == round(four["tokens_per_s"] / four["engine_tokens_per_s"], 3)
    assert {"added_ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "cpu_outside_engine_share"} <= set(four)
    assert figures["peers"] == {}
    assert set(figures["variant"]) == {"1", "4"}
    assert figures["cold_start_s"] > 0
    assert figures["replica_rss_bytes"] > 50 << 20
    assert figures["one_token_p50_s"] >= figures["engine_one_token_p50_s"] > 0


def test_first_token_of_the_bare_engine_is_the_first_that_a_client_could_read(toy_base: Path) -> None:
    """Half of the demo's answers to the benchmark's prompts begin with tokens of no text, and the server sends none of these."""
    codec = load_codec(toy_base)
    special, (word, *_) = codec.tokenizer.token_to_id("<|im_start|>"), codec.encode_text("lamp")
    assert first_text_s([(1.0, [special]), (2.0, [special, word]), (3.0, [word])], codec) == 2.0
    assert first_text_s([(1.0, [special]), (2.0, [special])], codec) == 2.0


def test_bench_serve_without_the_peers_python_exits_2(toy_quantized: Path, tmp_path: Path) -> None:
    options = ["--model", str(toy_quantized), "--peer", f"llama.cpp={tmp_path}/python", "--peer-gguf", str(toy_quantized / "manifest.json")]
    done = subprocess.run([sys.executable, "-m", "serving.bench", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such file" in done.stderr
