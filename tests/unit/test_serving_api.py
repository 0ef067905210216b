"""The OpenAI API in front of a scripted engine: what is refused, how answers are written, what a disconnect does."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infra.chat import ChatCodec, compile_template
from serving.admission import Gate
from serving.config import ServeConfig
from serving.engines.scripted import ScriptedEngine
from serving.front.figures import FrontFigures
from serving.front.replicas import Replicas
from serving.metrics import make_metrics, merge
from serving.openai_api import build_api
from serving.service import ServedModel, Service

CONTEXT_TOKENS = 5000
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}"
)
USER = [{"role": "user", "content": "hi"}]

Call = Callable[..., httpx.Response]


def byte_codec() -> ChatCodec:
    """One token a byte, so that characters and stop strings fall across tokens as they like."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return ChatCodec(tokenizer, compile_template(TEMPLATE), TEMPLATE, {})


def make_service(engine: ScriptedEngine, **limits: Any) -> Service:
    model = ServedModel("toy", "fp_1", CONTEXT_TOKENS, vocabulary_tokens=256, stop_ids=(7,), created_s=1)
    config = ServeConfig(**limits)
    gate = Gate(config.max_running_requests, config.max_queued_requests)
    return Service(model, engine, byte_codec(), config, make_metrics("toy", engine, gate, "r1"), gate)


def make_api(engine: ScriptedEngine, **limits: Any) -> FastAPI:
    return build_api(make_service(engine, **limits))


def scripted(text: str, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(byte_codec().encode_text(text), **options)


def request(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def events(response: httpx.Response) -> list[Any]:
    """The JSON of every event; the framing is checked on the way."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == "", "a stream ends with an empty line"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def json_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


BAD_BODIES: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    (CHAT, {"messages": USER}, 400, "model", "missing_required_parameter"),
    (CHAT, {"model": "toy"}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"model": "other", "messages": USER}, 404, "model", "model_not_found"),
    (CHAT, {"model": 7, "messages": USER}, 400, "model", "invalid_value"),
    (CHAT, {"model": "toy", "messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {"model": "toy", "messages": "hi"}, 400, "messages", "invalid_value"),
    (CHAT, {"model": "toy", "messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", "invalid_value"),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": 5}]}, 400, "messages", "invalid_value"),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "invalid_value"),
    (CHAT, {"model": "toy", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages", None),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": "x" * CONTEXT_TOKENS}]}, 400, None, "context_length_exceeded"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": 1.5}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": True}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": 10**12}, 400, None, "context_length_exceeded"),
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": 2500}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "temperature": -1}, 400, "temperature", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "temperature": 1e9}, 400, "temperature", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "temperature": "hot"}, 400, "temperature", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "top_p": 0}, 400, "top_p", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "top_p": 2}, 400, "top_p", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "top_k": 0}, 400, "top_k", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "seed": 1 << 70}, 400, "seed", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "presence_penalty": 3}, 400, "presence_penalty", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "frequency_penalty": -3}, 400, "frequency_penalty", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "n": 17}, 400, "n", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "min_p": 1.5}, 400, "min_p", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "repetition_penalty": 0}, 400, "repetition_penalty", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "stop": ["x"] * 10000}, 400, "stop", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "stop": [""]}, 400, "stop", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "stop": [5]}, 400, "stop", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "stream_options": {"include_usage": True}}, 400, "stream_options", None),
    (CHAT, {"model": "toy", "messages": USER, "response_format": {"type": "yaml"}}, 400, "response_format", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "response_format": json_format({"minimum": 1})}, 400, "response_format", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "structured_outputs": {}}, 400, "structured_outputs", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "structured_outputs": {"regex": "(?=a)"}}, 400, "structured_outputs", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "structured_outputs": {"json": "{"}}, 400, "structured_outputs", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "tool_choice": "required"}, 400, "tool_choice", None),
    (CHAT, {"model": "toy", "messages": USER, "tool_choice": {"function": {"name": "x"}}}, 400, "tool_choice", None),
    (CHAT, {"model": "toy", "messages": USER, "tool_choice": "maybe"}, 400, "tool_choice", "invalid_value"),
    (CHAT, {"model": "toy", "messages": USER, "top_logprobs": 3}, 400, "top_logprobs", None),
    (CHAT, {"model": "toy", "messages": USER, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    (
        CHAT,
        {"model": "toy", "messages": USER, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        400,
        "structured_outputs",
        None,
    ),
    (COMPLETION, {"model": "toy", "prompt": "x", "logprobs": 21}, 400, "logprobs", "invalid_value"),
    (COMPLETION, {"model": "toy", "prompt": "x", "best_of": 2}, 400, "best_of", "invalid_value"),
    ("/v1/embeddings", {"model": "toy", "input": "x"}, 400, "model", "unsupported_model"),
    ("/tokenize", {"prompt": "x", "messages": USER}, 400, "prompt", None),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}, 400, "add_special_tokens", "invalid_value"),
    ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model", "model_not_found"),
    ("/detokenize", {"tokens": [256]}, 400, "tokens", "invalid_token_id"),
    (CHAT, {"model": "toy", "messages": USER, "temprature": 1}, 400, "temprature", "unknown_parameter"),
    (COMPLETION, {"model": "toy"}, 400, "prompt", "missing_required_parameter"),
    (COMPLETION, {"model": "toy", "prompt": ""}, 400, "prompt", None),
    (COMPLETION, {"model": "toy", "prompt": []}, 400, "prompt", None),
    (COMPLETION, {"model": "toy", "prompt": [1, 256]}, 400, "prompt", "invalid_token_id"),
    (COMPLETION, {"model": "toy", "prompt": [-1]}, 400, "prompt", "invalid_token_id"),
    (COMPLETION, {"model": "toy", "prompt": ["a", "b"]}, 400, "prompt", "invalid_value"),
    (COMPLETION, {"model": "toy", "prompt": [1] * CONTEXT_TOKENS}, 400, None, "context_length_exceeded"),
    (COMPLETION, {"model": "toy", "prompt": "x", "echo": True}, 400, "echo", "invalid_value"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), BAD_BODIES)
def test_api_bad_parameter_gives_4xx_that_names_it(
    path: str, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    engine = scripted("x")
    response = request(make_api(engine), "POST", path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert engine.seen == []


NAN_TOOL = b'{"model":"toy","messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f","a":NaN}}]}'
LONE_SURROGATE = b'{"model":"toy","messages":[{"role":"user","content":"\\ud800"}]}'


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", NAN_TOOL, LONE_SURROGATE, b"[" * 100_000, b'{"a":' * 5000]
)
def test_api_body_that_is_no_json_object_gives_400(body: bytes) -> None:
    response = request(make_api(scripted("x")), "POST", CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_api_deeply_nested_tool_schema_is_no_server_error() -> None:
    nested: dict[str, Any] = {}
    for _ in range(150):
        nested = {"a": nested}
    body = {
        "model": "toy",
        "messages": USER,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": nested}}],
        "tool_choice": "required",
    }
    assert request(make_api(scripted("x")), "POST", CHAT, json=body).status_code in (200, 400)


@pytest.mark.parametrize("headers", [{}, {"transfer-encoding": "chunked"}])
def test_api_huge_body_gives_413(headers: dict[str, str]) -> None:
    async def parts() -> Any:
        for _ in range(300):
            yield b" " * 100

    content: Any = parts() if headers else b" " * 30_000
    api = make_api(scripted("x"), max_body_bytes=20_000)
    response = request(api, "POST", CHAT, content=content, headers={"content-type": "application/json", **headers})
    assert response.status_code == 413
    assert "20000" in response.json()["error"]["message"]


def test_api_other_media_type_gives_415() -> None:
    response = request(make_api(scripted("x")), "POST", CHAT, content=b"a=1", headers={"content-type": "application/x-www-form-urlencoded"})
    assert response.status_code == 415
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)])
def test_api_unknown_route_gives_openai_error(method: str, path: str, status: int) -> None:
    response = request(make_api(scripted("x")), method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_chat_fields_that_do_not_change_the_answer_are_accepted() -> None:
    body = {
        "model": "toy",
        "messages": USER,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "n": 1,
        "logit_bias": {},
        "logprobs": False,
    }
    assert request(make_api(scripted("ok")), "POST", CHAT, json=body).status_code == 200


def test_chat_json_answer_has_text_and_counts() -> None:
    engine = scripted("Grüße €5")
    body = {"model": "toy", "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    answer = request(make_api(engine), "POST", CHAT, json=body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "Grüße €5"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert byte_codec().decode(engine.seen[0][0]) == "system:ab\n"
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}


def test_chat_stream_splits_no_character_and_ends_with_usage() -> None:
    body = {"model": "toy", "messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    response = request(make_api(scripted("a€b😀")), "POST", CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response)
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert [text for text in texts if text] == ["a", "€", "b", "😀"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] and chunk["usage"] is None for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_chat_stream_tells_usage_so_far_where_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "toy", "messages": USER, "stream": True, "stream_options": options}
    *chunks, usage = events(request(make_api(scripted("abc", chunk_tokens=1)), "POST", CHAT, json=body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert chunks[-1]["usage"] == usage["usage"]


def test_completion_stream_of_token_ids_has_no_usage_unless_asked() -> None:
    engine = scripted("xyz")
    body = {"model": "toy", "prompt": [1, 2, 3], "stream": True, "max_tokens": 2}
    chunks = events(request(make_api(engine), "POST", COMPLETION, json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "xy"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)
    assert engine.seen[0][0] == (1, 2, 3)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [("END", "ab EN c"), (["zzz", "N c"], "ab E"), ("nowhere", "ab EN cEND d"), ("d!", "ab EN cEND d"), (["c", "b"], "a")],
)
def test_stop_string_across_tokens_ends_answer_before_it(chunk_tokens: int, stop: Any, shown: str) -> None:
    engine = scripted("ab EN cEND d", chunk_tokens=chunk_tokens)
    body = {"model": "toy", "prompt": "x", "stop": stop}
    whole = request(make_api(engine), "POST", COMPLETION, json=body).json()["choices"][0]
    streamed = events(request(make_api(engine), "POST", COMPLETION, json={**body, "stream": True}))
    assert whole["text"] == shown
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == shown
    assert whole["finish_reason"] == streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_sampling_parameters_reach_the_engine() -> None:
    engine = scripted("x")
    body = {"model": "toy", "prompt": "x", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 4, "presence_penalty": 1,
            "frequency_penalty": -1, "min_p": 0.1, "repetition_penalty": 1.5, "logprobs": 2}  # fmt: skip
    api = make_api(engine)
    request(api, "POST", COMPLETION, json=body)
    request(api, "POST", COMPLETION, json={"model": "toy", "prompt": "x", "ignore_eos": True})
    first, second = (sampling for _, sampling in engine.seen)
    assert asdict(first) == {
        **{key: body[key] for key in body if key not in ("model", "prompt")},
        "grammar": None,
        "stop_ids": (7,),
        "adapter": None,
    }
    assert (second.temperature, second.max_tokens, second.stop_ids) == (0.0, ServeConfig().default_max_tokens, ())


def test_default_length_shrinks_to_what_the_context_leaves() -> None:
    engine = scripted("x")
    request(make_api(engine), "POST", COMPLETION, json={"model": "toy", "prompt": [1] * (CONTEXT_TOKENS - 3)})
    assert engine.seen[0][1].max_tokens == 3


def test_engine_failure_before_the_first_token_gives_503() -> None:
    api = make_api(scripted("abc", fails_after=0))
    for stream in (True, False):
        response = request(api, "POST", COMPLETION, json={"model": "toy", "prompt": "x", "stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "server_error"
    assert request(api, "GET", "/health").status_code == 503


def test_engine_failure_within_a_stream_ends_it_with_an_error_event() -> None:
    response = request(make_api(scripted("abc", fails_after=2)), "POST", COMPLETION, json={"model": "toy", "prompt": "x", "stream": True})
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "as scripted" in last["error"]["message"]


def test_full_queue_gives_429_with_retry_after() -> None:
    async def fill_and_ask() -> httpx.Response:
        api = make_api(scripted("x", is_endless=True), max_running_requests=1, max_queued_requests=1)
        body = {"model": "toy", "prompt": "x"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            holders = [asyncio.create_task(client.post(COMPLETION, json=body)) for _ in range(2)]
            for _ in range(50):
                await asyncio.sleep(0)
            response = await client.post(COMPLETION, json=body)
            for holder in holders:
                holder.cancel()
            await asyncio.gather(*holders, return_exceptions=True)
        return response

    response = asyncio.run(fill_and_ask())
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert "1 requests are running and 1 waiting" in response.json()["error"]["message"]


def test_finished_requests_leave_the_queue() -> None:
    api = make_api(scripted("x"), max_running_requests=1, max_queued_requests=0)
    body = {"model": "toy", "prompt": "x"}
    assert [request(api, "POST", COMPLETION, json=body).status_code for _ in range(3)] == [200] * 3


def test_api_declared_length_over_the_limit_gives_413_unread() -> None:
    sent: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            raise AssertionError("the body is not to be read")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-length", b"9000000000")], "query_string": b""}
        await make_api(scripted("x"))(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels_the_generation(stream: bool) -> None:
    engine = scripted("abc", is_endless=True)
    body = json.dumps({"model": "toy", "prompt": "x", "stream": stream}).encode()

    async def leave_after_a_while() -> None:
        gone = asyncio.Event()
        mail = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if mail:
                return mail.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            await asyncio.sleep(0)

        scope = {"type": "http", "method": "POST", "path": COMPLETION, "headers": [], "query_string": b"", "raw_path": b""}
        call = asyncio.create_task(make_api(engine)(scope, receive, send))
        while engine.figures.num_running == 0:
            await asyncio.sleep(0)
        gone.set()
        await asyncio.wait_for(call, 5)

    asyncio.run(leave_after_a_while())
    assert engine.num_cancelled == 1
    assert engine.figures.num_running == 0


def test_metrics_count_requests_tokens_and_status() -> None:
    api = make_api(scripted("abcd"))
    request(api, "POST", COMPLETION, json={"model": "toy", "prompt": "xyz"})
    request(api, "POST", COMPLETION, json={"model": "toy", "prompt": ""})
    request(api, "GET", "/scan/1")
    text = request(api, "GET", "/metrics").text
    lines = text.splitlines()
    for path, status in (("/v1/completions", 200), ("/v1/completions", 400), ("other", 404)):
        assert f'slipway_requests_total{{model_name="toy",path="{path}",replica="r1",status="{status}"}} 1.0' in lines
    assert 'vllm:request_success_total{finished_reason="stop",model_name="toy",replica="r1"} 1.0' in lines
    for name, value in (
        ("vllm:prompt_tokens_total", 3),
        ("vllm:generation_tokens_total", 4),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 3),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:request_prefill_time_seconds_count", 1),
        ("vllm:request_decode_time_seconds_count", 1),
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:kv_cache_usage_perc", 0),
        ("slipway_engine_up", 1),
        ("slipway_requests_refused_total", 0),
    ):
        assert f'{name}{{model_name="toy",replica="r1"}} {value:.1f}' in lines


def test_metrics_of_the_prefix_cache_are_told_only_where_the_engine_tells() -> None:
    told = make_metrics("toy", scripted("x", prefix_counts=(100, 40)), Gate(1, 1), "r1").text
    assert 'vllm:prefix_cache_queries_total{model_name="toy",replica="r1"} 100.0' in told
    assert 'vllm:prefix_cache_hits_total{model_name="toy",replica="r1"} 40.0' in told
    assert "prefix_cache" not in make_metrics("toy", scripted("x"), Gate(1, 1), "r1").text


def test_metrics_of_tokens_guessed_ahead_are_told_only_where_the_engine_guesses() -> None:
    told = make_metrics("toy", scripted("x", draft_counts=(10, 30, 12)), Gate(1, 1), "r1").text
    for name, value in (("drafts", 10), ("draft_tokens", 30), ("accepted_tokens", 12)):
        assert f'vllm:spec_decode_num_{name}_total{{model_name="toy",replica="r1"}} {value}.0' in told
    assert "spec_decode" not in make_metrics("toy", scripted("x"), Gate(1, 1), "r1").text


def test_metrics_of_replicas_merge_into_families_that_parse() -> None:
    texts = []
    for replica in ("r1", "r2"):
        engine, gate = scripted("x"), Gate(1, 1)
        metrics = make_metrics("toy", engine, gate, replica)
        metrics.prompt_tokens.inc(3)
        texts.append(metrics.text)
    merged = merge(texts)
    families = list(text_string_to_metric_families(merged))
    assert len({family.name for family in families}) == len(families)
    (prompt,) = [family for family in families if family.name == "vllm:prompt_tokens"]
    totals = {sample.labels["replica"]: sample.value for sample in prompt.samples if sample.name.endswith("_total")}
    assert totals == {"r1": 3.0, "r2": 3.0}
    assert len(merged.splitlines()) == 2 * len(texts[0].splitlines()) - merged.count("# ")


def test_dashboard_names_only_metrics_that_are_served_and_all_of_vllms() -> None:
    expressions = re.findall(r'"expr": "(.*)"', (Path(__file__).parents[2] / "infra/grafana/serving.json").read_text())
    named = {name for expression in expressions for name in re.findall(r"(?:vllm:|slipway_)\w+", expression)}
    api = make_api(scripted("abcd", prefix_counts=(9, 3), draft_counts=(3, 9, 4)))
    request(api, "POST", COMPLETION, json={"model": "toy", "prompt": "xyz"})
    served = set(re.findall(r"^([\w:]+){", request(api, "GET", "/metrics").text, re.MULTILINE))
    served |= set(re.findall("^# TYPE ([\\w:]+)", FrontFigures("toy", Replicas("token"), lambda: 0).text, re.MULTILINE))
    assert named <= served
    families = {re.sub("_(created|sum|count)$", "", name) for name in served if name.startswith("vllm:")}
    assert {name for name in families if name in served} <= named


def test_models_lists_the_one_model_and_knows_no_other() -> None:
    api = make_api(scripted("x"))
    assert [model["id"] for model in request(api, "GET", "/v1/models").json()["data"]] == ["toy"]
    assert request(api, "GET", "/v1/models/toy").json()["max_model_len"] == CONTEXT_TOKENS
    assert request(api, "GET", "/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_answers_are_among_the_figures_that_the_autoscaling_policy_gets() -> None:
    service = make_service(scripted("hello"))
    for _ in range(3):
        assert request(build_api(service), "POST", COMPLETION, json={"model": "toy", "prompt": "hi"}).status_code == 200
    first_token_s, num_recent = service.metrics.recent_first_tokens.figures()
    assert num_recent == 3
    assert 0 < first_token_s < 10
