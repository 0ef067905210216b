"""Which replica a prompt goes to."""

from __future__ import annotations

import json

from pydantic import SecretStr

from serving.announcement import Announcement
from serving.front import routing
from serving.front.pools import FirstTokenTimes, cheapest_in_time
from serving.front.replicas import Replica
from serving.front.routing import Router, prompt_blocks


def replica(name: str, num_running: int = 0, num_places: int = 16) -> Replica:
    standing = Announcement(token=SecretStr("t"), replica=name, host="h", port=1, num_places=num_places)
    return Replica(standing, num_running)


def chat(*contents: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content} for content in contents]}).encode()


LONG = "the same beginning " * 30


def test_blocks_of_prompts_that_begin_alike_begin_alike() -> None:
    ours, theirs = prompt_blocks(chat(LONG, "one")), prompt_blocks(chat(LONG, "two"))
    assert ours[:4] == theirs[:4]
    assert ours[-1] != theirs[-1]
    assert prompt_blocks(chat("other " + LONG))[0] != ours[0]


def test_blocks_of_what_is_no_request_are_none() -> None:
    assert prompt_blocks(b"\xff") == prompt_blocks(b"[1]") == prompt_blocks(b"") == []
    assert len(prompt_blocks(json.dumps({"prompt": "x" * 10**6}).encode())) == routing.MAX_BLOCKS


def test_router_without_a_prefix_takes_the_least_busy() -> None:
    assert Router().choose([replica("a", 3), replica("b", 2), replica("c", 8, 128)], []).name == "c"


def test_router_prompt_that_goes_on_returns_to_where_it_began() -> None:
    router, busy, idle = Router(), replica("a"), replica("b")
    first = router.choose([busy, idle], prompt_blocks(chat(LONG)))
    first.num_running = routing.SPARE_REQUESTS - 1
    again = router.choose([busy, idle], prompt_blocks(chat(LONG, "answer", "and another question " * 20)))
    assert again is first
    assert router.choose([busy, idle], prompt_blocks(chat("something else " * 30))) is not first


def test_router_holder_with_clearly_more_to_do_is_passed_over() -> None:
    router, first = Router(), replica("a")
    blocks = prompt_blocks(chat(LONG))
    router.choose([first], blocks)
    first.num_running = routing.SPARE_REQUESTS
    assert router.choose([first, replica("b")], blocks).name == "b"


def test_router_holder_without_a_free_place_is_passed_over() -> None:
    router, first = Router(), replica("a", num_places=1)
    blocks = prompt_blocks(chat(LONG))
    router.choose([first], blocks)
    first.num_running = 1
    assert router.choose([first, replica("b", 1, 4)], blocks).name == "b"


def test_router_forgets_the_oldest_prompts() -> None:
    router, first = Router(), replica("a")
    router.choose([first], prompt_blocks(chat(LONG)))
    for number in range(routing.MAX_HELD_BLOCKS // 40):
        router.choose([first], [f"{number} {index}".encode() for index in range(50)])
    assert len(router._holders) == routing.MAX_HELD_BLOCKS
    assert prompt_blocks(chat(LONG))[0] not in router._holders


def of_pool(pool: str, usd_per_hour: float, num_running: int = 0) -> Replica:
    made = replica(f"{pool}-1", num_running, num_places=4)
    return Replica(made.standing.model_copy(update={"pool": pool, "usd_per_hour": usd_per_hour}), num_running)


def test_pool_cheapest_that_answers_in_time_gets_the_request() -> None:
    now_s = 100.0
    times = FirstTokenTimes(lambda: now_s)
    cpu, gpu = of_pool("cpu", 0.1), of_pool("gpu", 2.0)
    assert cheapest_in_time([gpu, cpu], times, 1.0) == [cpu]
    times.note("cpu", 3.0)
    assert cheapest_in_time([gpu, cpu], times, 1.0) == [gpu]
    times.note("gpu", 5.0)
    assert cheapest_in_time([gpu, cpu], times, 1.0) == [cpu], "none is in time, so the one that is less late"
    now_s += 11
    times.note("gpu", 0.1)
    assert cheapest_in_time([gpu, cpu], times, 1.0) == [cpu], "what it was slow by is long ago"


def test_pool_without_a_free_place_spills_over() -> None:
    times = FirstTokenTimes()
    cpu, gpu = of_pool("cpu", 0.1, num_running=4), of_pool("gpu", 2.0)
    assert cheapest_in_time([cpu, gpu], times, 1.0) == [gpu]
    gpu.num_running = 4
    assert list(cheapest_in_time([cpu, gpu], times, 1.0)) == [cpu, gpu]


def test_pool_price_is_that_of_a_place() -> None:
    small, large = of_pool("small", 1.0), of_pool("large", 3.0)
    large.standing = large.standing.model_copy(update={"num_places": 64})
    assert cheapest_in_time([small, large], FirstTokenTimes(), 1.0) == [large]


def test_first_token_times_follow_the_newest() -> None:
    times = FirstTokenTimes(lambda: 0.0)
    assert times.expected_s("cpu") == 0.0
    for _ in range(20):
        times.note("cpu", 1.0)
    for _ in range(10):
        times.note("cpu", 0.1)
    assert 0.1 < times.expected_s("cpu") < 0.2
