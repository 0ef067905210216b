"""Who is let in to the API: deadlines, priorities, keys, request ids."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from infra import api_keys
from infra.errors import ConfigError
from serving import access, request_log
from serving.engines.scripted import ScriptedEngine
from tests.unit.test_serving_api import CHAT, COMPLETION, make_api, request, scripted

BODY = {"model": "toy", "prompt": "x"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("headers", [{"X-Request-Timeout-S": "0.05"}, {}, {"X-Request-Timeout-S": "900"}])
def test_deadline_before_an_answer_gives_504_and_frees_the_slot(headers: dict[str, str]) -> None:
    engine = scripted("x", is_endless=True)
    api = make_api(engine, request_timeout_s=600 if headers.get("X-Request-Timeout-S") == "0.05" else 0.05)
    response = request(api, "POST", COMPLETION, json=BODY, headers=headers)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert "0.05 s" in response.json()["error"]["message"]
    assert (engine.figures.num_running, engine.num_cancelled) == (0, 1)


def test_deadline_within_a_stream_ends_it_with_an_error_event() -> None:
    engine = scripted("x", is_endless=True)
    api = make_api(engine, request_timeout_s=0.05)
    response = request(api, "POST", COMPLETION, json={**BODY, "stream": True})
    assert response.status_code == 200
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    assert engine.num_cancelled == 1


def test_deadline_holds_for_a_request_that_waits() -> None:
    async def scene() -> httpx.Response:
        api = make_api(scripted("x", is_endless=True), max_running_requests=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            holder = asyncio.create_task(client.post(COMPLETION, json=BODY))
            await asyncio.sleep(0.05)
            response = await client.post(COMPLETION, json=BODY, headers={"X-Request-Timeout-S": "0.05"})
            holder.cancel()
            await asyncio.gather(holder, return_exceptions=True)
        return response

    assert asyncio.run(scene()).status_code == 504


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", ""])
def test_deadline_header_that_is_no_time_gives_400(value: str) -> None:
    response = request(make_api(scripted("x")), "POST", COMPLETION, json=BODY, headers={"X-Request-Timeout-S": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout-S"


@pytest.mark.parametrize("value", ["x" * 129, "a b", "a\tb", "é"])
def test_request_id_out_of_bounds_gives_400(value: str) -> None:
    response = request(make_api(scripted("x")), "GET", "/v1/models", headers={"x-request-id": value.encode()})
    assert response.status_code == 400


@pytest.mark.parametrize("priority", [-101, 101, 1.5, "high"])
def test_priority_out_of_bounds_gives_400(priority: Any) -> None:
    response = request(make_api(scripted("x")), "POST", COMPLETION, json={**BODY, "priority": priority})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


def test_priority_decides_who_of_the_waiting_runs_first() -> None:
    async def scene() -> list[int]:
        engine = ScriptedEngine([65] * 20)
        api = make_api(engine, max_running_requests=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            calls = []
            for priority in (0, 5, 0, -5):
                calls.append(asyncio.create_task(client.post(COMPLETION, json={**BODY, "prompt": [priority + 100], "priority": priority})))
                await asyncio.sleep(0)
            assert [response.status_code for response in await asyncio.gather(*calls)] == [200] * 4
        return [ids[0] - 100 for ids, _ in engine.seen]

    assert asyncio.run(scene()) == [0, -5, 0, 5]


def keyed_api(key_file: Path, **limits: Any) -> FastAPI:
    return make_api(scripted("ok"), api_keys_file=key_file, **limits)


def test_keys_valid_key_is_answered_and_others_get_401_in_openai_shape(key_file: Path) -> None:
    _, secret = api_keys.add(key_file, "me")
    api = keyed_api(key_file)
    assert request(api, "POST", COMPLETION, json=BODY, headers=bearer(secret)).status_code == 200
    for headers in (
        {},
        bearer("sk-wrong"),
        bearer(secret[:-1]),
        bearer(secret + "x"),
        {"authorization": secret},
        {"authorization": f"Basic {secret}"},
        bearer("é" * 2000),
    ):
        raw = {name: value.encode() for name, value in headers.items()}
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/nope")):
            response = request(api, method, path, content=b"{", headers=raw)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


def test_keys_health_and_metrics_are_open_unless_closed(key_file: Path) -> None:
    api_keys.add(key_file, "me")
    api, closed = keyed_api(key_file), keyed_api(key_file, open_paths=["/health"])
    assert [request(api, "GET", path).status_code for path in ("/health", "/metrics")] == [200, 200]
    assert [request(closed, "GET", path).status_code for path in ("/health", "/metrics")] == [200, 401]


def test_keys_file_is_followed_while_serving_and_survives_damage(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "KEYS_LOOK_S", 0.0)
    (_, first), (_, second) = api_keys.add(key_file, "first"), api_keys.add(key_file, "second")
    api = keyed_api(key_file)

    def statuses() -> list[int]:
        return [request(api, "GET", "/v1/models", headers=bearer(secret)).status_code for secret in (first, second)]

    assert statuses() == [200, 200]
    api_keys.revoke(key_file, "first")
    assert statuses() == [401, 200]
    key_file.write_text("{")
    assert statuses() == [401, 200]


def test_keys_priority_beyond_the_keys_own_gives_403(key_file: Path) -> None:
    (_, plain), (_, urgent) = api_keys.add(key_file, "plain"), api_keys.add(key_file, "urgent", top_priority=-10)
    api = keyed_api(key_file)

    def ask(secret: str, priority: int) -> int:
        return request(api, "POST", COMPLETION, json={**BODY, "priority": priority}, headers=bearer(secret)).status_code

    assert [ask(plain, 1), ask(plain, -1), ask(urgent, -10), ask(urgent, -11)] == [200, 403, 200, 403]


def test_keys_share_a_busy_server_by_the_tokens_they_got(key_file: Path) -> None:
    """One place, and answers of 20 tokens for one key and of 2 for the other: the second gets about ten for each of the first's."""
    (_, long), (_, short) = api_keys.add(key_file, "long"), api_keys.add(key_file, "short")

    async def scene() -> list[int]:
        engine = ScriptedEngine([65] * 20)
        api = make_api(engine, api_keys_file=key_file, max_running_requests=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            calls = [
                client.post(COMPLETION, json={**BODY, "prompt": [1], "max_tokens": num_tokens}, headers=bearer(secret))
                for _ in range(12)
                for secret, num_tokens in ((long, 20), (short, 2))
            ]
            assert {response.status_code for response in await asyncio.gather(*calls)} == {200}
        return [sampling.max_tokens for _, sampling in engine.seen]

    order = asyncio.run(scene())
    assert order[:9].count(20) <= 2


def test_keys_file_keeps_no_key_and_no_two_are_alike(key_file: Path) -> None:
    secrets = {api_keys.add(key_file, f"user{number}")[1] for number in range(10)}
    text = key_file.read_text()
    assert len(secrets) == 10
    assert all(secret not in text and len(secret) >= 43 for secret in secrets)
    keys = api_keys.read(key_file)
    assert {api_keys.find(keys, secret).name for secret in secrets} == {f"user{number}" for number in range(10)}  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "keys": []}', '{"keys": [{"name": "x"}]}'])
def test_keys_file_that_is_none_is_refused_by_name(key_file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys.read(key_file)
    key_file.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.json: not a file of API keys"):
        api_keys.read(key_file)


def test_keys_wrong_names_and_values_are_refused(key_file: Path) -> None:
    api_keys.add(key_file, "me")
    for arguments, message in ((("me",), "already"), (("a b",), "name 'a b'"), (("x", 0.0), "weight"), (("x", 1.0, -101), "top_priority")):
        with pytest.raises(ConfigError, match=message):
            api_keys.add(key_file, *arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Its keys: me"):
        api_keys.revoke(key_file, "you")
    assert os.listdir(key_file.parent).count("keys.json") == 1


@pytest.mark.parametrize("log_prompts", [False, True])
def test_request_log_has_ids_and_outcomes_and_prompts_only_when_asked_for(tmp_path: Path, log_prompts: bool) -> None:
    request_log.write_to(tmp_path, "r1")
    try:
        api = make_api(scripted("x"), log_prompts=log_prompts)
        body = {"model": "toy", "messages": [{"role": "user", "content": "a secret wish"}]}
        request(api, "POST", CHAT, json=body, headers={"X-Request-Id": "mine-7"})
        request(api, "POST", CHAT, json={**body, "temperature": "secret"})
    finally:
        logging.getLogger(request_log.LOGGER_NAME).handlers.pop().close()
    text = (tmp_path / "requests-r1.jsonl").read_text()
    good, bad = (json.loads(line) for line in text.splitlines())
    assert (good["request_id"], good["status"], good["outcome"], bad["status"]) == ("mine-7", 200, "done", 400)
    assert bad["request_id"]
    assert ("secret" in text) is log_prompts
