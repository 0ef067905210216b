"""A real server: Ray Serve, the real engine, the official client."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

MESSAGES: Any = [{"role": "user", "content": "turn the lamp on please"}]


@pytest.fixture(scope="session")
def client(toy_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def figure(url: str, name: str) -> float:
    """The sum over labels of one metric."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.05)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_client_chat_and_stream_give_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=24, user="me")
    stream = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text
    assert text
    assert whole.usage == chunks[-1].usage
    assert whole.system_fingerprint == chunks[0].system_fingerprint


def test_client_completion_of_text_equals_that_of_its_ids(client: openai.OpenAI, toy_quantized: Path) -> None:
    from infra.chat import load_codec

    ids = load_codec(toy_quantized).encode_text("turn the lamp")
    by_text = client.completions.create(model="toy", prompt="turn the lamp", max_tokens=8)
    by_ids = client.completions.create(model="toy", prompt=ids, max_tokens=8)
    streamed = client.completions.create(model="toy", prompt=ids, max_tokens=8, stream=True)
    assert by_text.choices[0].text == by_ids.choices[0].text == "".join(chunk.choices[0].text for chunk in streamed)
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == len(ids)


def test_client_models_names_the_served_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


def test_client_errors_have_their_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.chat.completions.create(model="toy", messages=MESSAGES, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="toy", prompt="lamp " * 400)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.get("/nope", cast_to=object)


def test_server_thirty_two_streams_all_complete(toy_server: Any) -> None:
    async def one(client: openai.AsyncOpenAI, index: int) -> int:
        stream = await client.completions.create(
            model="toy", prompt=f"{index} lamp", max_tokens=100, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        return chunks[-1].usage.completion_tokens

    async def run() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{toy_server.url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, index) for index in range(32))))

    assert asyncio.run(run()) == [100] * 32


@pytest.mark.parametrize("stream", [True, False])
def test_server_disconnected_clients_stop_the_engine(toy_server: Any, stream: bool) -> None:
    num_clients, num_tokens = 32, 220
    before = figure(toy_server.url, "vllm:generation_tokens_total")
    body = {"model": "toy", "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}

    async def leave_early(client: httpx.AsyncClient, index: int) -> None:
        async with client.stream("POST", f"{toy_server.url}/v1/completions", json={**body, "prompt": f"{index} please"}) as response:
            await anext(response.aiter_raw())

    async def run() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            calls = [asyncio.create_task(leave_early(client, index)) for index in range(num_clients)]
            while figure(toy_server.url, "vllm:generation_tokens_total") == before:
                await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(run())
    wait_until(lambda: figure(toy_server.url, "vllm:num_requests_running") == 0)
    made = figure(toy_server.url, "vllm:generation_tokens_total") - before
    assert 0 < made < 0.9 * num_clients * num_tokens


def test_server_replica_loads_neither_torch_nor_transformers(toy_server: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="toy", prompt="lamp", max_tokens=2)
    by_command = [(" ".join(process.cmdline()), Path(f"/proc/{process.pid}/maps").read_text()) for process in toy_server.family()]
    (replica,) = [maps for command, maps in by_command if "ServeReplica" in command]
    (engine,) = [maps for command, maps in by_command if "openvino_steps" in command]
    assert "libopenvino" in engine
    for maps in (replica, engine):
        assert "libtorch" not in maps
        assert "site-packages/torch/" not in maps


def test_serving_modules_import_neither_torch_nor_transformers() -> None:
    code = "import serving.deployment, serving.engines.openvino_steps, serving.app, serving.predict, sys; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "openvino_genai" in modules
    assert modules.isdisjoint({"torch", "transformers", "optimum", "nncf", "training", "mlflow"})


def test_openvino_process_loads_no_pydantic_where_nothing_guesses() -> None:
    """It costs 13 MB and a tenth of the time until the engine is ready."""
    code = "import serving.engines.openvino_steps, sys; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "openvino_genai" in modules
    assert modules.isdisjoint({"pydantic", "yaml"})


def test_server_health_answers_only_with_a_running_engine(toy_server: Any) -> None:
    assert httpx.get(f"{toy_server.url}/health").status_code == 200
    assert figure(toy_server.url, "slipway_engine_up") == 1


def test_server_request_id_is_returned_and_logged(toy_server: Any) -> None:
    response = httpx.get(f"{toy_server.url}/v1/models", headers={"X-Request-Id": "mine-8"})
    assert response.headers.get_list("x-request-id") == ["mine-8"]

    def logged() -> list[str]:
        lines = [json.loads(line) for path in toy_server.output_dir.glob("requests-*.jsonl") for line in path.read_text().splitlines()]
        return [line["path"] for line in lines if line.get("request_id") == "mine-8"]

    wait_until(lambda: bool(logged()))  # a line is written once the answer is out
    assert logged() == ["/v1/models"]


def test_app_sigterm_drains_and_leaves_no_process(start_toy_server: Callable[..., Any]) -> None:
    server = start_toy_server()
    server.wait_ready()
    family = server.family()
    body = {"model": "toy", "prompt": "lamp", "max_tokens": 230, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        parts = response.iter_raw()
        first = next(parts)
        server.process.send_signal(signal.SIGTERM)
        text = (first + b"".join(parts)).decode()
    assert text.endswith("data: [DONE]\n\n")
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert len(family) >= 5
    assert alive(family) == []
    assert not (server.output_dir / "serving.json").exists()


def test_app_sigterm_during_start_leaves_no_process(start_toy_server: Callable[..., Any]) -> None:
    server = start_toy_server()
    wait_until(lambda: any("raylet" in process.name() for process in server.family()), 60)
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    server.process.communicate(timeout=60)
    assert server.process.returncode != 0
    wait_until(lambda: alive(family) == [], 5)


def test_app_port_in_use_exits_2_before_ray_starts(start_toy_server: Callable[..., Any], busy_port: int) -> None:
    server = start_toy_server(port=busy_port)
    _, stderr = server.process.communicate(timeout=30)
    assert server.process.returncode == 2
    assert f"port {busy_port} on 127.0.0.1 cannot be used" in stderr
    error = json.loads(Path(f"{server.config}.error.json").read_text())
    assert error["type"] == "ConfigError"


def test_app_tampered_model_exits_2_naming_file_and_both_digests(
    start_toy_server: Callable[..., Any], toy_quantized: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tampered"
    folder.mkdir()
    for path in toy_quantized.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    server = start_toy_server(model_dir=folder)
    _, stderr = server.process.communicate(timeout=30)
    digest = json.loads((folder / "manifest.json").read_text())["files"]["openvino_model.bin"]["sha256"]
    assert server.process.returncode == 2
    assert "openvino_model.bin" in stderr
    assert digest in stderr
    assert len([word for word in stderr.replace(",", " ").replace(".", " ").split() if len(word) == 64]) == 2


def test_client_knows_every_new_field(client: openai.OpenAI, toy_server: Any) -> None:
    several = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=6, n=2, temperature=1.0, seed=3, logprobs=True,
        extra_body={"min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].message.content != several.choices[1].message.content
    assert several.choices[0].logprobs is not None
    assert several.choices[0].logprobs.content is not None
    assert all(token.logprob <= 0 for token in several.choices[0].logprobs.content)
    plain = client.completions.create(model="toy", prompt="lamp", max_tokens=3, logprobs=0)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or ()) == 3
    chosen = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=20, extra_body={"structured_outputs": {"choice": ["on", "off (now)"]}}
    )
    assert chosen.choices[0].message.content in ("on", "off (now)")
    with pytest.raises(openai.BadRequestError, match="openvino") as raised:
        client.chat.completions.create(model="toy", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert raised.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="toy", input="lamp")
    assert httpx.post(f"{toy_server.url}/tokenize", json={"prompt": "lamp"}).json()["count"] >= 1


def test_client_tool_call_and_schema_whole_and_streamed(client: openai.OpenAI) -> None:
    properties = {"on": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["on"], "additionalProperties": False}
    tools: Any = [{"type": "function", "function": {"name": "lamp", "parameters": schema}}]
    body: Any = {"model": "toy", "messages": MESSAGES, "temperature": 1.5, "seed": 4, "max_tokens": 150}
    whole = client.chat.completions.create(**body, tools=tools, tool_choice="required").choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or ()
    stream = client.chat.completions.create(
        **body, tools=tools, tool_choice={"type": "function", "function": {"name": "lamp"}}, stream=True
    )
    (delta,) = [part for chunk in stream for part in chunk.choices[0].delta.tool_calls or ()]
    assert call.type == "function"
    assert call.function.name == delta.function.name == "lamp"
    assert set(json.loads(call.function.arguments)) == {"on"} == set(json.loads(delta.function.arguments))
    answer = client.chat.completions.create(
        **body, response_format={"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema}}
    ).choices[0]
    assert set(json.loads(answer.message.content or "")) == {"on"}
    client.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=2)  # and the engine goes on
