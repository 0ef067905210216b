"""Who gets in: the fair queue alone, and the gate on an event loop with a clock of the test's own."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from serving.admission import Claim, FairQueue, Gate, Ticket
from serving.errors import ApiError


def ticket(key: str, priority: int = 0, weight: float = 1.0, num_prompt: int = 10) -> Ticket:
    return Ticket(Claim(key, weight, priority, num_prompt))


def serve(queue: FairQueue, num_tokens: int) -> Ticket:
    """Runs the next request to its end."""
    served = queue.pop()
    queue.charge(served.claim, num_tokens)
    return served


def test_queue_flooding_key_leaves_every_second_turn_to_another() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(ticket("flood"))
    for _ in range(10):
        queue.push(ticket("calm"))
    keys = [serve(queue, 50).claim.key for _ in range(20)]
    assert keys.count("calm") == 10


def test_queue_shares_tokens_and_not_requests() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(ticket("long"))
        queue.push(ticket("short"))
    keys = []
    for _ in range(44):
        served = queue.pop()
        queue.charge(served.claim, 1000 if served.claim.key == "long" else 100)
        keys.append(served.claim.key)
    assert keys.count("long") == 4


@pytest.mark.parametrize("seed", range(20))
def test_queue_backlogged_keys_get_tokens_by_weight(seed: int) -> None:
    """Whatever the sizes, what two waiting keys got for their weights differs by no more than one request's worth."""
    chance = random.Random(seed)
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}
    queue, got = FairQueue(), defaultdict[str, float](float)
    for _ in range(400):
        for key, weight in weights.items():
            queue.push(ticket(key, weight=weight))
    for _ in range(300):
        size = chance.randint(1, 500)
        served = serve(queue, size)
        got[served.claim.key] += size / served.claim.weight
        if len(got) == len(weights):
            assert max(got.values()) - min(got.values()) <= 500 / min(weights.values())


@pytest.mark.parametrize("seed", range(20))
def test_queue_random_use_keeps_order_and_loses_nothing(seed: int) -> None:
    """The most urgent class always goes first, within it each key in its own order, and every ticket leaves exactly once."""
    chance = random.Random(seed)
    queue, waiting = FairQueue(), list[Ticket]()
    for _ in range(600):
        action = chance.random()
        if action < 0.5 or not waiting:
            waiting.append(ticket(chance.choice("abcd"), chance.randint(-2, 2), chance.choice((0.5, 1.0, 4.0))))
            queue.push(waiting[-1])
        elif action < 0.8:
            served = serve(queue, chance.randint(1, 99))
            lane = [item for item in waiting if (item.claim.priority, item.claim.key) == (served.claim.priority, served.claim.key)]
            assert served is lane[0]
            assert served.claim.priority == min(item.claim.priority for item in waiting)
            waiting.remove(served)
        else:
            gone = waiting.pop(chance.randrange(len(waiting)))
            queue.remove(gone)
            queue.remove(gone)
        assert len(queue) == len(waiting)


def test_queue_key_back_after_a_pause_has_saved_nothing_up() -> None:
    queue = FairQueue()
    queue.push(ticket("busy"))
    for _ in range(50):
        queue.push(ticket("busy"))
        serve(queue, 1000)
    for _ in range(20):
        queue.push(ticket("busy"))
        queue.push(ticket("back"))
    assert [serve(queue, 1000).claim.key for _ in range(10)].count("busy") == 5


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def hold(gate: Gate, claim: Claim, until: asyncio.Event, order: list[str] | None = None) -> None:
    async with gate.place(claim):
        if order is not None:
            order.append(claim.key)
        await until.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def claim(key: str = "", priority: int = 0) -> Claim:
    return Claim(key, 1.0, priority, 10)


def run(scene: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scene(), 20))


def test_gate_waiting_request_that_leaves_gives_up_its_seat() -> None:
    async def scene() -> None:
        gate, end, order = Gate(1, 2), asyncio.Event(), list[str]()
        running, leaving, staying = (asyncio.create_task(hold(gate, claim(key), end, order)) for key in ("running", "leaving", "staying"))
        await settle()
        assert (gate.num_running, gate.num_waiting) == (1, 2)
        leaving.cancel()
        await settle()
        assert gate.num_waiting == 1
        end.set()
        await asyncio.gather(running, staying)
        assert order == ["running", "staying"]
        assert (gate.num_running, gate.num_waiting) == (0, 0)

    run(scene)


@pytest.mark.parametrize("order", ["waiting leaves first", "place is given first", "place becomes free first"])
def test_gate_request_that_leaves_as_it_is_called_in_keeps_no_place(order: str) -> None:
    async def scene() -> None:
        gate, end = Gate(1, 5), asyncio.Event()
        running = asyncio.create_task(hold(gate, claim(), end))
        waiting = asyncio.create_task(hold(gate, claim(), asyncio.Event()))
        await settle()
        if order == "waiting leaves first":
            waiting.cancel()
            running.cancel()
        elif order == "place is given first":
            running.cancel()
            await asyncio.sleep(0)
            waiting.cancel()
        else:
            end.set()
            waiting.cancel()
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert not any(isinstance(outcome, asyncio.InvalidStateError) for outcome in outcomes)
        assert (gate.num_running, gate.num_waiting) == (0, 0)
        end.set()
        await hold(gate, claim(), end)

    run(scene)


def test_gate_longest_wait_is_that_of_the_first_in_the_queue() -> None:
    async def scene() -> None:
        clock, end = Clock(), asyncio.Event()
        gate = Gate(1, 5, clock)
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.create_task(hold(gate, claim(), end)))
            await settle()
            clock.now_s += 2.0
        assert gate.longest_wait_s == 4.0
        end.set()
        await asyncio.gather(*tasks)
        assert gate.longest_wait_s == 0.0

    run(scene)


def test_gate_full_queue_refuses_the_key_that_fills_it_and_makes_room_for_others() -> None:
    async def scene() -> None:
        gate, end, order = Gate(1, 4), asyncio.Event(), list[str]()
        tasks = [asyncio.create_task(hold(gate, claim("flood"), end, order)) for _ in range(5)]
        await settle()
        with pytest.raises(ApiError) as refused:
            await hold(gate, claim("flood"), end)
        assert refused.value.status == 429
        tasks.append(asyncio.create_task(hold(gate, claim("calm"), end, order)))
        await settle()
        assert gate.num_waiting == 4
        assert isinstance(tasks[4].exception(), ApiError)  # the last of the flood
        end.set()
        await asyncio.gather(*tasks[:4], tasks[5])
        assert order.index("calm") <= 2

    run(scene)


def test_gate_full_queue_gives_the_seat_of_the_less_urgent_to_the_more_urgent() -> None:
    async def scene() -> None:
        gate, end, order = Gate(1, 2), asyncio.Event(), list[str]()
        tasks = [asyncio.create_task(hold(gate, claim(key, priority), end, order)) for key, priority in (("r", 0), ("x", 0), ("late", 5))]
        await settle()
        with pytest.raises(ApiError):
            await hold(gate, claim("y", 6), end)
        tasks.append(asyncio.create_task(hold(gate, claim("urgent", -1), end, order)))
        await settle()
        assert isinstance(tasks[2].exception(), ApiError)
        end.set()
        await asyncio.gather(tasks[0], tasks[1], tasks[3])
        assert order == ["r", "urgent", "x"]

    run(scene)


@pytest.mark.parametrize(("duration_s", "num_waiting", "expected_s"), [(0.1, 3, 1), (4.0, 3, 8), (4.0, 0, 2), (500.0, 5, 60)])
def test_gate_retry_after_follows_the_measured_rate_within_bounds(duration_s: float, num_waiting: int, expected_s: int) -> None:
    """Two places and requests of D seconds end every D/2 seconds; N waiting and one more are through after (N + 1) * D / 2."""

    async def scene() -> int:
        clock = Clock()
        gate, end = Gate(2, 10, clock), asyncio.Event()
        for _ in range(3):
            async with gate.place(claim()):
                clock.now_s += duration_s
        tasks = [asyncio.create_task(hold(gate, claim(), end)) for _ in range(2 + num_waiting)]
        await settle()
        retry_after_s = gate.retry_after_s
        end.set()
        await asyncio.gather(*tasks)
        return retry_after_s

    assert run(scene) == expected_s
