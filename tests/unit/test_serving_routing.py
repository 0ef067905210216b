"""Which replica a prompt goes to."""

from __future__ import annotations

import json

from pydantic import SecretStr

from serving.announcement import Announcement
from serving.front import routing
from serving.front.pools import FirstTokenTimes, cheapest_in_time
from serving.front.replicas import Replica
from serving.front.routing import Router, Wanted, read_wanted


def replica(name: str, num_running: int = 0, num_places: int = 16) -> Replica:
    standing = Announcement(token=SecretStr("t"), replica=name, host="h", port=1, num_places=num_places)
    return Replica(standing, num_running)


def chat(*contents: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content} for content in contents]}).encode()


LONG = "the same beginning " * 30


def test_blocks_of_prompts_that_begin_alike_begin_alike() -> None:
    ours, theirs = read_wanted(chat(LONG, "one")).blocks, read_wanted(chat(LONG, "two")).blocks
    assert ours[:4] == theirs[:4]
    assert ours[-1] != theirs[-1]
    assert read_wanted(chat("other " + LONG)).blocks[0] != ours[0]


def test_blocks_of_what_is_no_request_are_none() -> None:
    assert read_wanted(b"\xff") == read_wanted(b"[1]") == read_wanted(b"") == Wanted()
    assert len(read_wanted(json.dumps({"prompt": "x" * 10**6}).encode()).blocks) == routing.MAX_BLOCKS


def test_router_without_a_prefix_takes_the_least_busy() -> None:
    assert Router().choose([replica("a", 3), replica("b", 2), replica("c", 8, 128)], Wanted()).name == "c"


def test_router_prompt_that_goes_on_returns_to_where_it_began() -> None:
    router, busy, idle = Router(), replica("a"), replica("b")
    first = router.choose([busy, idle], read_wanted(chat(LONG)))
    first.num_running = routing.SPARE_REQUESTS - 1
    again = router.choose([busy, idle], read_wanted(chat(LONG, "answer", "and another question " * 20)))
    assert again is first
    assert router.choose([busy, idle], read_wanted(chat("something else " * 30))) is not first


def test_router_holder_with_clearly_more_to_do_is_passed_over() -> None:
    router, first = Router(), replica("a")
    wanted = read_wanted(chat(LONG))
    router.choose([first], wanted)
    first.num_running = routing.SPARE_REQUESTS
    assert router.choose([first, replica("b")], wanted).name == "b"


def test_router_holder_without_a_free_place_is_passed_over() -> None:
    router, first = Router(), replica("a", num_places=1)
    wanted = read_wanted(chat(LONG))
    router.choose([first], wanted)
    first.num_running = 1
    assert router.choose([first, replica("b", 1, 4)], wanted).name == "b"


def test_router_forgets_the_oldest_prompts() -> None:
    router, first = Router(), replica("a")
    router.choose([first], read_wanted(chat(LONG)))
    for number in range(routing.MAX_HELD_BLOCKS // 40):
        router.choose([first], Wanted([f"{number} {index}".encode() for index in range(50)]))
    assert len(router._holders) == routing.MAX_HELD_BLOCKS
    assert read_wanted(chat(LONG)).blocks[0] not in router._holders


def holding(name: str, *adapters: str, num_running: int = 0) -> Replica:
    made = replica(name, num_running)
    return Replica(made.standing.model_copy(update={"adapters": adapters}), num_running)


def of_adapter(name: str, text: str = LONG) -> Wanted:
    return read_wanted(json.dumps({"model": name, "prompt": text}).encode(), "toy", {"red", "blue"})


def test_wanted_adapter_has_two_names_and_prefixes_of_its_own() -> None:
    red, same, blue, model = (of_adapter(name) for name in ("red", "toy:red", "blue", "toy"))
    assert (red.adapter, blue.adapter, model.adapter, of_adapter("other").adapter) == ("red", "blue", None, None)
    assert red == same
    assert not set(red.blocks) & (set(blue.blocks) | set(model.blocks))


def test_router_adapter_goes_to_the_least_busy_replica_that_holds_it() -> None:
    idle, first, second = holding("idle", "blue"), holding("first", "red", num_running=3), holding("second", "red", "blue", num_running=2)
    assert Router().choose([idle, first, second], of_adapter("red")) is second
    assert Router().choose([idle, first, second], of_adapter("blue")) is idle
    assert Router().choose([idle, first, second], of_adapter("toy")) is idle


def test_router_adapter_held_by_one_that_has_clearly_more_to_do_goes_to_another() -> None:
    idle, busy = holding("idle"), holding("busy", "red", num_running=routing.SPARE_REQUESTS)
    assert Router().choose([idle, busy], of_adapter("red")) is idle


def test_router_adapter_that_a_replica_no_longer_holds_draws_nothing_there() -> None:
    router, first, second = Router(), holding("first", "red"), holding("second", num_running=1)
    assert router.choose([first, second], of_adapter("red")) is first
    first.standing = first.standing.model_copy(update={"adapters": ("blue",)})
    second.standing = second.standing.model_copy(update={"adapters": ("red",)})
    assert router.choose([first, second], of_adapter("red")) is second


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
