"""The curve of a real server, small as it is, and the plan that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.capacity.curves import Curve


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.cli", *options], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_bench_curve_of_a_running_server_is_a_curve_that_plans_are_made_of(toy_server: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    options = ["--url", toy_server.url, "--output", str(file), "--streams", "1", "4", "--tokens", "8", "--rounds", "1"]
    many = run("bench", "curve", *options, "--cpus-per-replica", "1", "--prompt-words", "60")
    assert "fewer --prompt-words" in many.stderr
    options += ["--prompt-words", "24"]  # its context is 256 bytes
    done = run("bench", "curve", *options, "--cpus-per-replica", "1", "--hardware", "this machine")
    assert done.returncode == 0, done.stderr
    curve = Curve(**yaml.safe_load(file.read_text()))
    assert sorted(curve.tokens_per_s) == [1, 4]
    assert curve.prompt_tokens_per_s > 0
    assert curve.cold_start_s is not None
    planned = run("plan", "--tokens-per-s", "1000", "--ttft", "5", "--curve", str(file), "--json")
    assert planned.returncode == 0, planned.stderr
    (made,) = json.loads(planned.stdout)["plans"]
    assert made["curve"] == "mine"
    assert made["kept"]["num_replicas"] >= 1


def test_bench_curve_where_no_server_is_exits_with_what_is_needed(free_port: int, tmp_path: Path) -> None:
    options = ["--url", f"http://127.0.0.1:{free_port}", "--output", str(tmp_path / "mine.yaml"), "--cpus-per-replica", "1"]
    command = [sys.executable, "-m", "serving.capacity.measure", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "A server of the OpenAI API is needed there" in done.stderr
    assert not (tmp_path / "mine.yaml").exists()
