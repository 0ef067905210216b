"""Who gets in at a real server that asks for keys and has one place and two seats."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

LONG = {"model": "toy", "prompt": "lamp", "max_tokens": 230, "ignore_eos": True}


def keys_command(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "keys", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def server(start_toy_server: Callable[..., Any], key_file: Path) -> Iterator[tuple[str, str]]:
    """Its URL, and a key that is valid there."""
    key = keys_command("add", "main", "--file", str(key_file), "--json")["key"]
    running = start_toy_server(api_keys_file=str(key_file), open_paths=[], max_running_requests=1, max_queued_requests=2)
    try:
        running.wait_ready()
        yield running.url, key
    finally:
        running.stop()


def client(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_server_full_queue_refuses_the_rest_of_a_burst_and_answers_what_it_took(server: tuple[str, str]) -> None:
    async def scene() -> Counter[str]:
        async with client(*server) as ours:

            async def one(number: int) -> str:
                try:
                    await ours.completions.create(model="toy", prompt=f"{number} lamp", max_tokens=200, extra_body={"ignore_eos": True})
                except openai.RateLimitError as error:
                    return "refused" if 1 <= int(error.response.headers["retry-after"]) <= 60 else "refused for nobody knows how long"
                return "answered"

            return Counter(await asyncio.gather(*(one(number) for number in range(12))))

    counts = asyncio.run(scene())
    assert counts["answered"] + counts["refused"] == 12
    assert counts["answered"] >= 3
    assert counts["refused"] >= 1


def test_server_deadline_ends_the_answer_and_frees_the_place(server: tuple[str, str]) -> None:
    url, key = server
    headers = {"authorization": f"Bearer {key}"}
    late = httpx.post(f"{url}/v1/completions", json=LONG, headers={**headers, "X-Request-Timeout-S": "0.01"})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert httpx.post(f"{url}/v1/completions", json=LONG, headers=headers).status_code == 200


def test_server_keys_made_and_revoked_by_command_count_at_once(server: tuple[str, str], key_file: Path) -> None:
    url, _ = server
    key = keys_command("add", "guest", "--file", str(key_file)).strip()
    assert key not in key_file.read_text()
    time.sleep(1.1)  # the file is looked at once a second
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 401
    assert [item["name"] for item in keys_command("list", "--file", str(key_file), "--json")["keys"]] == ["main", "guest"]
    keys_command("revoke", "guest", "--file", str(key_file))
    time.sleep(1.1)
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_chat_command_sends_the_key_of_the_environment(server: tuple[str, str]) -> None:
    url, key = server

    def chat(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "chat", "lamp", "--url", url, "--max-tokens", "4"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})

    assert chat(SLIPWAY_API_KEY=key).returncode == 0
    without = chat()
    assert without.returncode == 2
    assert "SLIPWAY_API_KEY" in without.stderr


def test_app_without_its_keys_exits_2_before_ray_starts(start_toy_server: Callable[..., Any], tmp_path: Path) -> None:
    server = start_toy_server(api_keys_file=str(tmp_path / "none.json"))
    _, stderr = server.process.communicate(timeout=30)
    assert server.process.returncode == 2
    assert "slipway keys add" in stderr
