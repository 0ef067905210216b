"""The front before real replicas' HTTP servers, whose engines are scripted, and before peers that break off."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from infra.network import free_port
from serving.announcement import Announcement, Announcer, FrontAddress
from serving.config import ServeConfig
from serving.engines.scripted import ScriptedEngine
from serving.front.server import FrontServer
from serving.openai_api import build_api
from serving.replica_http import FromFront, ReplicaServer
from tests.unit.test_serving_adapters import service_with_adapters
from tests.unit.test_serving_api import CHAT, COMPLETION, USER, make_api, scripted

HOST = "127.0.0.1"
BODY = {"model": "toy", "prompt": "hi"}
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Stand:
    """A front and its replicas, those on the event loop of the test."""

    def __init__(self, **limits: Any) -> None:
        self.limits = ServeConfig(port=free_port(), **limits)
        self.woken = threading.Event()
        self.front = FrontServer(self.limits, HOST, wake=self.woken.set, model_name="toy")
        self.address = self.front.start()
        self.url = f"http://{HOST}:{self.limits.port}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=20)
        self.exits = AsyncExitStack()

    async def add(self, engine: ScriptedEngine, name: str = "a", **limits: Any) -> Announcer:
        """A replica with this engine, once the front knows of it."""
        server = ReplicaServer(FromFront(make_api(engine, **limits), self.address.token.get_secret_value()), HOST)
        self.exits.push_async_callback(server.stop)
        return await self.announce(name, server.port)

    async def add_peer(self, answer: Peer, name: str = "a") -> Announcer:
        """Something that announces itself as a replica and answers each connection like this."""
        server = await self.exits.enter_async_context(await asyncio.start_server(answer, HOST, 0))
        return await self.announce(name, server.sockets[0].getsockname()[1])

    async def announce(self, name: str, port: int, part: Callable[[], None] = lambda: None, **changes: Any) -> Announcer:
        standing = Announcement(token=self.address.token, replica=name, host=HOST, port=port, num_places=4, **changes)
        announcer = Announcer(self.address, lambda: standing, part)
        announcer.start()
        self.exits.push_async_callback(announcer.stop)
        await until(lambda: name in self.names)
        return announcer

    @property
    def names(self) -> set[str]:
        return {replica.name for replica in self.front.replicas.all}

    async def post(self, **changes: Any) -> httpx.Response:
        return await self.client.post(COMPLETION, json={**BODY, **changes})


@asynccontextmanager
async def stand(**limits: Any) -> AsyncIterator[Stand]:
    made = Stand(**limits)
    try:
        yield made
    finally:
        await made.client.aclose()
        await asyncio.to_thread(made.front.stop)
        await made.exits.aclose()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0.01)


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *said: bytes) -> None:
    """Reads a request, says this much, and is gone."""
    await reader.readuntil(b"\r\n\r\n")
    for part in said:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05)
    writer.transport.abort()


def test_front_whole_and_streamed_answers_pass_unchanged() -> None:
    async def scene() -> None:
        async with stand() as here:
            await here.add(scripted("hello"))
            whole = await here.post()
            assert whole.json()["choices"][0]["text"] == "hello"
            async with here.client.stream("POST", CHAT, json={"model": "toy", "messages": USER, "stream": True}) as streamed:
                text = (await streamed.aread()).decode()
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert text.endswith("data: [DONE]\n\n")
            assert (
                "".join(json.loads(block[6:])["choices"][0]["delta"].get("content") or "" for block in text.split("\n\n")[:-2]) == "hello"
            )
            refused = await here.client.get("/nope?a=%2F")
            assert refused.status_code == 404
            assert "/nope" in refused.json()["error"]["message"]

    asyncio.run(scene())


def test_front_request_of_an_adapter_goes_to_the_replica_that_holds_it() -> None:
    async def scene() -> None:
        async with stand(adapters={"red": "folder"}) as here:
            for name, held in (("a", ()), ("b", ("red",)), ("c", ())):
                api = build_api(service_with_adapters(name))
                server = ReplicaServer(FromFront(api, here.address.token.get_secret_value()), HOST)
                here.exits.push_async_callback(server.stop)
                await here.announce(name, server.port, adapters=held)
            for model in ("red", "toy:red"):
                assert (await here.post(model=model)).json()["choices"][0]["text"] == "b"
            assert (await here.post(prompt="another")).json()["choices"][0]["text"] == "a"

    asyncio.run(scene())


def test_front_client_that_leaves_frees_the_engine() -> None:
    async def scene() -> None:
        async with stand() as here:
            engine = scripted("hello", is_endless=True)
            await here.add(engine)
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True}) as streamed:
                await anext(streamed.aiter_raw())
            await until(lambda: engine.num_cancelled == 1)

    asyncio.run(scene())


def test_front_full_replica_another_answers_and_429_only_from_all() -> None:
    async def scene() -> None:
        async with stand() as here:
            engine = scripted("hello", is_endless=True)
            await here.add(engine, max_running_requests=1, max_queued_requests=0)
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True}) as streamed:
                parts = streamed.aiter_raw()
                await anext(parts)  # kept, since a generator that is dropped closes its stream
                alone = await here.post()
                assert alone.status_code == 429
                assert alone.headers["retry-after"]
                await here.add(scripted("other"), "b")
                texts = [(await here.post(prompt=f"{number}")).json()["choices"][0]["text"] for number in range(4)]
                assert texts == ["other"] * 4

    asyncio.run(scene())


def test_front_replica_whose_engine_failed_is_left_for_another() -> None:
    async def scene() -> None:
        async with stand() as here:
            await here.add(scripted("hello", fails_after=0))
            broken = asyncio.create_task(here.post())
            await until(lambda: not here.front.replicas.usable)
            await here.add(scripted("other"), "b")
            assert (await broken).json()["choices"][0]["text"] == "other"

    asyncio.run(scene())


@pytest.mark.parametrize("said", [(), (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",)])
def test_front_replica_that_breaks_off_before_its_answer_is_whole_costs_no_request(said: tuple[bytes, ...]) -> None:
    async def scene() -> None:
        async with stand() as here:
            lost: list[Announcer] = []

            async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await break_off(reader, writer, *said)
                await lost[0].stop()

            lost.append(await here.add_peer(die))
            asked = asyncio.create_task(here.post())
            await until(lambda: here.names == set())
            await here.add(scripted("other"), "b")
            assert (await asked).json()["choices"][0]["text"] == "other"

    asyncio.run(scene())


def test_front_stream_whose_replica_breaks_off_ends_with_an_error_event_and_no_half_event() -> None:
    async def scene() -> str:
        async with stand() as here:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            event = b'data: {"choices":[]}\n\ndata: {"cho'
            await here.add_peer(lambda reader, writer: break_off(reader, writer, head, b"%x\r\n%s\r\n" % (len(event), event)))
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True}) as streamed:
                return (await streamed.aread()).decode()

    first, last, rest = asyncio.run(scene()).split("\n\n")
    assert (first, rest) == ('data: {"choices":[]}', "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_front_without_a_replica_wakes_holds_and_then_answers() -> None:
    async def scene() -> None:
        async with stand(max_queued_requests=2) as here:
            assert (await here.client.get("/health")).status_code == 503
            assert not here.woken.is_set()
            held = [asyncio.create_task(here.post()) for _ in range(2)]
            await until(here.woken.is_set)
            late = await here.client.post(COMPLETION, json=BODY, headers={"X-Request-Timeout-S": "0.1"})
            assert late.status_code in (429, 503)
            await here.add(scripted("hello"))
            assert [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*held)] == ["hello"] * 2

    asyncio.run(scene())


def test_front_holds_no_more_than_may_queue_and_no_longer_than_the_deadline() -> None:
    async def scene() -> None:
        async with stand(max_queued_requests=1) as here:
            first = asyncio.create_task(here.client.post(COMPLETION, json=BODY, headers={"X-Request-Timeout-S": "1"}))
            await until(here.woken.is_set)
            second = await here.post()
            assert second.status_code == 429
            assert int(second.headers["retry-after"]) >= 1
            assert (await first).status_code == 503

    asyncio.run(scene())


def test_front_draining_answers_503_and_finishes_what_runs() -> None:
    async def scene() -> None:
        async with stand() as here:
            await here.add(scripted("hello", is_endless=True))
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True, "max_tokens": 2000}) as streamed:
                parts = streamed.aiter_raw()
                await anext(parts)
                draining = asyncio.create_task(asyncio.to_thread(here.front.drain, 0.5))
                async with asyncio.timeout(5):
                    while (refused := await here.post()).status_code == 200:
                        pass
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                await anext(parts)  # and this one goes on
                await draining

    asyncio.run(scene())


def test_front_replica_that_drains_gets_nothing_new() -> None:
    async def scene() -> None:
        async with stand() as here:
            await here.add(scripted("hello"))
            await here.announce("b", 1, is_draining=True)
            assert [(await here.post()).status_code for _ in range(6)] == [200] * 6

    asyncio.run(scene())


def test_front_stranger_with_another_token_is_no_replica() -> None:
    async def scene() -> None:
        async with stand() as here:
            reader, writer = await asyncio.open_connection(HOST, here.address.port)
            stranger = Announcement(token=SecretStr("guess"), replica="x", host=HOST, port=1, num_places=1)
            writer.write(stranger.as_line())
            assert await reader.read() == b""
            assert here.names == set()
            writer.close()

    asyncio.run(scene())


def test_replica_port_asked_past_the_front_answers_403() -> None:
    async def scene() -> None:
        server = ReplicaServer(FromFront(make_api(scripted("hello")), "secret"), HOST)
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{server.port}") as client:
            assert (await client.post(COMPLETION, json=BODY)).status_code == 403
            assert (await client.post(COMPLETION, json=BODY, headers={"X-Slipway-Front": "guess"})).status_code == 403
            assert (await client.post(COMPLETION, json=BODY, headers={"X-Slipway-Front": "secret"})).status_code == 200
        await server.stop()

    asyncio.run(scene())


def test_front_metrics_hold_every_replica_once() -> None:
    async def scene() -> str:
        async with stand() as here:
            await here.add(scripted("hello"))
            await here.add(scripted("hello"), "b")
            for number in range(4):
                await here.post(prompt=str(number))
            return (await here.client.get("/metrics")).text

    lines = asyncio.run(scene()).splitlines()
    assert sum(line.startswith("# TYPE vllm:generation_tokens_total") for line in lines) == 1
    assert len([line for line in lines if line.startswith("vllm:generation_tokens_total{")]) == 2


def figures(text: str, name: str) -> dict[str, float]:
    """The samples of one metric, by the value of their last label; `model_name` is among the labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]
    assert all(sample.labels["model_name"] == "toy" for sample in samples)
    return {[*sample.labels.values()][-1]: sample.value for sample in samples}


def test_front_metrics_tell_what_is_held_in_flight_asked_again_and_refused() -> None:
    async def scene() -> None:
        async with stand(max_queued_requests=1) as here:
            held = asyncio.create_task(here.post())
            await until(here.woken.is_set)
            assert (await here.post()).status_code == 429
            await here.client.get("/health")
            text = (await here.client.get("/metrics")).text
            assert figures(text, "slipway_front_requests_held") == {"toy": 1}
            assert figures(text, "slipway_front_refused_total") == {"429": 1}, "a look at the health is no request"
            await here.add(scripted("hello", fails_after=0))
            await until(lambda: here.names == {"a"} and not here.front.replicas.usable)
            finite = await here.add(scripted("other"), "b")
            assert (await held).status_code == 200
            await here.add(scripted("endless", is_endless=True), "c", max_running_requests=1, max_queued_requests=0)
            await finite.stop()
            await until(lambda: here.names == {"a", "c"})
            async with here.client.stream("POST", COMPLETION, json={**BODY, "stream": True}) as streamed:
                parts = streamed.aiter_raw()
                await anext(parts)
                assert (await here.post()).status_code == 429
                text = (await here.client.get("/metrics")).text
            assert figures(text, "slipway_front_requests_in_flight") == {"a": 0, "c": 1}
            assert figures(text, "slipway_front_requests_held") == {"toy": 0}
            assert figures(text, "slipway_front_refused_total") == {"429": 1}, "the second one is the replica's"
            assert figures(text, "slipway_front_retries_total") == {"lost": 0, "full": 0, "failed": 1}, "nobody was left to be asked again"

    asyncio.run(scene())


def test_front_metrics_without_a_replica_are_closed_where_they_need_a_key() -> None:
    async def scene() -> tuple[int, int]:
        async with stand() as here, stand(open_paths=["/health"]) as closed:
            return (await here.client.get("/metrics")).status_code, (await closed.client.get("/metrics")).status_code

    assert asyncio.run(scene()) == (200, 503)


def test_front_body_above_the_limit_answers_413() -> None:
    async def scene() -> int:
        async with stand(max_body_bytes=2000) as here:
            await here.add(scripted("hello"))
            return (await here.post(prompt="x" * 3000)).status_code

    assert asyncio.run(scene()) == 413


def test_front_address_never_shows_its_secret() -> None:
    address = FrontAddress(host=HOST, port=1, token=SecretStr("secret"))
    assert "secret" not in repr(address)
    assert "secret" not in str(address.model_dump(mode="json"))
