"""Traces of requests, as a real collector gets them: the front and replicas are real, their engines scripted."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.errors import ConfigError
from infra.network import free_port
from serving import gen_ai, request_log
from serving.announcement import Announcer
from serving.choice import Order
from serving.engines.base import Sampling
from serving.openai_api import build_api
from serving.replica_http import FromFront, ReplicaServer
from serving.tracing import Tracer, make_tracer
from tests.unit.collector import Collector, Told, collecting
from tests.unit.test_serving_api import CHAT, COMPLETION, make_service, request, scripted
from tests.unit.test_serving_front import BODY, HOST, Stand, break_off, stand, until

CLIENTS_TRACE, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{CLIENTS_TRACE}-{CLIENTS_SPAN}-01"}
SERVER, CLIENT = 2, 3


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """One that the environment names; nothing is sent before it must be."""
    with collecting() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        yield made


async def add(here: Stand, engine: Any, name: str = "a", **limits: Any) -> Tracer:
    """A traced replica behind the front of `here`; as a real one, it sends its last traces when the front parts."""
    tracer = make_tracer(name)
    app = FromFront(build_api(make_service(engine, **limits), tracer), here.address.token.get_secret_value())
    server = ReplicaServer(app, HOST)
    here.exits.push_async_callback(asyncio.to_thread, tracer.stop)
    here.exits.push_async_callback(server.stop)
    await here.announce(name, server.port, part=tracer.flush)
    return tracer


@contextmanager
def log_lines(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines of the request log, after the block."""
    request_log.write_to(folder, "r1")
    lines: list[dict[str, Any]] = []
    try:
        yield lines
    finally:
        logging.getLogger(request_log.LOGGER_NAME).handlers.pop().close()
    lines += [json.loads(line) for line in (folder / "requests-r1.jsonl").read_text().splitlines()]


def test_trace_off_in_fresh_process_loads_nothing_of_it_and_on_does() -> None:
    code = (
        "import sys, serving.front.server, serving.front.proxy; front = [name for name in sys.modules if 'opentelemetry' in name]\n"
        "import serving.openai_api, threading; from serving.tracing import make_tracer; tracer = make_tracer('x')\n"
        "span = tracer.request('POST', '/v1/completions', {}); span.child('part', {}).end(); span.end()\n"
        "heavy = [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'requests'))]\n"
        "print(len(front), len(heavy), threading.active_count(), span.is_recorded)"
    )

    def run(**variables: str) -> list[str]:
        environment = {"PATH": "", "PYTHONPATH": ":".join(path or "." for path in sys.path), **variables}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return done.stdout.split()

    assert run(OTEL_TRACES_SAMPLER="always_on") == ["0", "0", "1", "False"]
    _, num_heavy, num_threads, is_recorded = run(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://127.0.0.1:1/v1/traces")
    assert int(num_heavy) > 10
    assert (num_threads, is_recorded) == ("2", "True")


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_trace_variable_that_says_no_is_followed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(name, value)
    assert type(make_tracer("x")) is Tracer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_trace_variable_that_cannot_be_followed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        make_tracer("x")


def test_trace_of_a_request_goes_on_from_the_client_over_the_front_to_the_replica(collector: Collector, tmp_path: Path) -> None:
    asked = {"model": "toy", "messages": [{"role": "user", "content": "xylophone"}], "max_tokens": 9, "temperature": 0.5, "seed": 7}

    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("quicksilver"))
            for stream in (False, True):
                body = {**asked, "stop": ["zeppelin"], "user": "walrus", "stream": stream}
                headers = {**TRACEPARENT, "X-Request-Id": f"mine-{int(stream)}"}
                assert (await here.client.post(CHAT, json=body, headers=headers)).status_code == 200
            await here.client.get("/health")
            await here.client.get("/metrics")
            await asyncio.to_thread(here.front.drain, 5)
            assert len(collector.named("chat toy")) == 2, "replicas have sent theirs before the front goes on to end"

    with log_lines(tmp_path) as lines:
        asyncio.run(scene())
    for number in range(2):
        front = collector.named(f"POST {CHAT}")[number]
        (ask,) = collector.children(front)
        (replica,) = collector.children(ask)
        assert (front.trace_id, front.parent_id) == (CLIENTS_TRACE, CLIENTS_SPAN)
        assert {span.trace_id for span in (ask, replica)} == {CLIENTS_TRACE}
        assert [span.kind for span in (front, ask, replica)] == [SERVER, CLIENT, SERVER]
        assert replica.name == "chat toy"
        assert [part.name for part in collector.children(replica)] == ["queue", "prefill", "decode"]
        queue, prefill, decode = collector.children(replica)
        assert front.start_s <= ask.start_s <= replica.start_s <= queue.start_s <= queue.end_s <= prefill.start_s
        assert prefill.end_s == pytest.approx(decode.start_s, abs=1e-4)
        assert decode.end_s <= replica.end_s
        assert front.attributes["slipway.request_id"] == replica.attributes["slipway.request_id"] == f"mine-{number}"
        assert (
            replica.attributes.items()
            >= {
                "gen_ai.request.model": "toy",
                "gen_ai.request.stream": bool(number),
                "gen_ai.request.max_tokens": 9,
                "gen_ai.request.temperature": 0.5,
                "gen_ai.request.seed": 7,
                "gen_ai.usage.input_tokens": len("user:xylophone\n"),
                "gen_ai.usage.output_tokens": 9,
                "http.response.status_code": 200,
                "slipway.outcome": "done",
            }.items()
        )
        assert replica.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert (front.attributes["http.response.status_code"], ask.attributes["slipway.replica"]) == (200, "a")
    assert len(collector.spans) == 2 * 6, "and none of /health and /metrics"
    assert [(line["request_id"], line["trace_id"]) for line in lines if line["method"] == "POST"] == [
        ("mine-0", CLIENTS_TRACE), ("mine-1", CLIENTS_TRACE)
    ]  # fmt: skip
    sent = b"".join(collector.bodies)
    assert b"gen_ai.request.model" in sent
    assert not [word for word in (b"xylophone", b"quicksilver", b"zeppelin", b"walrus") if word in sent]


def test_trace_without_a_clients_own_begins_at_the_front_and_names_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")

    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("hello"))
            await here.client.post(COMPLETION, json=BODY, headers={"traceparent": "00-nonsense"})
            await here.client.get("/v1/a%20path%20of%20my%20own?and=words")
            await asyncio.to_thread(here.front.drain, 5)

    asyncio.run(scene())
    front, replica = collector.one(f"POST {COMPLETION}"), collector.one("text_completion toy")
    assert (front.parent_id, len(front.trace_id)) == ("", 32)
    assert replica.trace_id == front.trace_id
    assert [span.resource["service.instance.id"] for span in (front, replica)] == ["front", "a"]
    for span in (front, replica):
        assert span.resource.items() >= {"service.name": "slipway", "deployment.environment.name": "test"}.items()
    assert {span.attributes.get("url.path") for span in collector.named("GET")} == {"/v1/a path of my own"}
    assert b"and=words" not in b"".join(collector.bodies)


def test_trace_shows_every_replica_that_was_asked_and_why_the_next_one_was(collector: Collector) -> None:
    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("hello", fails_after=0))
            broken = asyncio.create_task(here.post())
            await until(lambda: not here.front.replicas.usable)
            lost: list[Announcer] = []

            async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await break_off(reader, writer)
                await lost[0].stop()

            lost.append(await here.add_peer(die, "b"))
            await until(lambda: here.names == {"a"})
            await add(here, scripted("other"), "c")
            assert (await broken).json()["choices"][0]["text"] == "other"
            await asyncio.to_thread(here.front.drain, 5)

    asyncio.run(scene())
    front = collector.one(f"POST {COMPLETION}")
    parts = collector.children(front)
    asks = [part for part in parts if part.name == "ask a replica"]
    assert [ask.attributes["slipway.replica"] for ask in (asks[0], asks[-1])] == ["a", "c"]
    assert {ask.attributes.get("error.type") for ask in asks if ask.attributes["slipway.replica"] == "b"} == {"lost"}
    assert [ask.attributes["http.request.resend_count"] for ask in asks] == list(range(len(asks)))
    assert (asks[0].attributes["error.type"], asks[0].attributes["http.response.status_code"]) == ("failed", 503)
    assert [ask.is_error for ask in asks] == [True] * (len(asks) - 1) + [False]
    assert "wait for a replica" in {part.name for part in parts}
    failed, good = sorted(collector.named("text_completion toy"), key=lambda span: span.start_s)
    assert failed.is_error
    assert not good.is_error
    assert not front.is_error


def test_trace_of_what_was_cut_short_says_how(collector: Collector) -> None:
    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("hello", is_endless=True), max_running_requests=1)
            late = await here.client.post(COMPLETION, json=BODY, headers={"X-Request-Timeout-S": "0.1", "X-Request-Id": "late"})
            assert late.status_code == 504
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True}, headers={"X-Request-Id": "gone"}) as streamed:
                parts = streamed.aiter_raw()
                await anext(parts)
                waiting = await here.client.post(COMPLETION, json=BODY, headers={"X-Request-Timeout-S": "0.1", "X-Request-Id": "waits"})
                assert waiting.status_code == 504
            await asyncio.to_thread(here.front.drain, 5)

    asyncio.run(scene())
    by_id = {span.attributes.get("slipway.request_id"): span for span in collector.named("text_completion toy")}
    late, gone, waits = by_id["late"], by_id["gone"], by_id["waits"]
    assert (late.attributes["slipway.outcome"], late.attributes["error.type"], late.is_error) == ("deadline", "deadline", True)
    assert late.attributes["gen_ai.usage.output_tokens"] > 0
    assert "gen_ai.response.finish_reasons" not in gone.attributes
    assert [part.name for part in collector.children(waits)] == ["queue"]
    (front,) = [span for span in collector.named(f"POST {COMPLETION}") if span.attributes["slipway.request_id"] == "gone"]
    assert front.attributes["slipway.outcome"] == "client left"


@pytest.mark.parametrize(
    ("sampler", "headers", "num_traces"),
    [
        ("always_off", {}, 0),
        ("parentbased_always_on", {"traceparent": TRACEPARENT["traceparent"][:-1] + "0"}, 0),
        ("parentbased_always_off", TRACEPARENT, 1),
    ],
)
def test_trace_is_sampled_as_the_variable_says_and_logged_all_the_same(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sampler: str, headers: dict[str, str], num_traces: int
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)

    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("hello"))
            assert (await here.client.post(COMPLETION, json=BODY, headers=headers)).status_code == 200
            await asyncio.to_thread(here.front.drain, 5)

    with log_lines(tmp_path) as lines:
        asyncio.run(scene())
    assert len({span.trace_id for span in collector.spans}) == num_traces
    assert len(lines[0]["trace_id"]) == 32
    assert not headers or lines[0]["trace_id"] == CLIENTS_TRACE


def test_trace_sampled_at_a_ratio_is_kept_whole_or_not_at_all(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")

    async def scene() -> None:
        async with stand() as here:
            await add(here, scripted("hello"))
            for _ in range(64):
                await here.post()
            await asyncio.to_thread(here.front.drain, 5)

    asyncio.run(scene())
    traces: dict[str, list[Told]] = {}
    for span in collector.spans:
        traces.setdefault(span.trace_id, []).append(span)
    assert 8 < len(traces) < 56  # of 64 at a half; fewer or more come once in 10^10 times
    assert {len(spans) for spans in traces.values()} == {6}


def test_collector_that_never_answers_holds_up_no_request_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting(holds=True) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")

        async def scene() -> list[int]:
            async with stand() as here:
                await add(here, scripted("hello"))
                await here.post()
                await until(lambda: collector.num_waiting >= 2)  # the front's sender and the replica's
                statuses = [(await here.post()).status_code for _ in range(40)]
                assert not collector.spans
                return statuses

        started_s = time.monotonic()
        assert asyncio.run(scene()) == [200] * 40
        assert time.monotonic() - started_s < 9, "the library itself would wait ten seconds for the collector, and thirty at the end"
        assert not collector.spans


def test_collector_that_is_down_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    tracer = make_tracer("x")
    api = build_api(make_service(scripted("hello")), tracer)
    try:
        assert [request(api, "POST", COMPLETION, json=BODY).status_code for _ in range(20)] == [200] * 20
    finally:
        tracer.stop()


def test_attributes_of_generations_are_names_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    order = Order([1, 2], Sampling(max_tokens=3, top_k=4, seed=5), ("stop here",), num_choices=2)
    attributes = gen_ai.asked("completion", "toy", order, is_stream=False) | gen_ai.answered(3, {1: "stop", 0: "length"})
    assert set(attributes) <= known
    assert attributes["gen_ai.response.finish_reasons"] == ["length", "stop"]
    assert "stop here" not in str(attributes)


def test_api_without_a_tracer_passes_a_clients_trace_on_unread() -> None:
    async def scene() -> httpx.Headers:
        seen: list[httpx.Headers] = []

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
            seen.append(httpx.Headers([line.split(": ", 1) for line in head]))  # type: ignore[misc]
            await reader.readexactly(int(seen[0]["content-length"]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        async with stand() as here:
            await here.add_peer(echo)
            assert (await here.client.post(COMPLETION, json=BODY, headers=TRACEPARENT)).status_code == 200
        return seen[0]

    assert asyncio.run(scene())["traceparent"] == TRACEPARENT["traceparent"]
