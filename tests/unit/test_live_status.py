"""`slipway status` of a running server: what is read out of two looks, and the command against a real front with scripted engines."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from infra.errors import ConfigError
from infra.network import free_port
from pipelines import live, status
from serving.admission import Gate
from serving.metrics import Metrics, make_metrics, merge
from tests.unit.test_serving_api import scripted
from tests.unit.test_serving_front import BODY, HOST, Stand, stand

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} QUERIES
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} HITS
"""


def metrics_of(*replicas: str) -> list[Metrics]:
    return [make_metrics("toy", scripted("x"), Gate(1, 1), replica) for replica in replicas]


def look(moment_s: float, metrics: Sequence[Metrics]) -> live.Look:
    return live.read(merge([one.text for one in metrics]), moment_s)


def test_look_rates_and_times_are_those_between_two_looks() -> None:
    a, b = metrics_of("a", "b")
    a.generated_tokens.inc(1000)
    a.first_token.observe(9.0)
    before = look(10.0, [a, b])
    a.generated_tokens.inc(50)
    b.generated_tokens.inc(150)
    b.prompt_tokens.inc(30)
    for _ in range(10):
        b.first_token.observe(0.15)
    found = live.compare(before, look(12.0, [a, b]))
    assert {name: one.made_tokens_per_s for name, one in found.replicas.items()} == {"a": 25.0, "b": 75.0}
    assert (found.all.made_tokens_per_s, found.all.prompt_tokens_per_s, found.interval_s) == (100.0, 15.0, 2.0)
    first_a, first_b = found.replicas["a"].ttft_s, found.replicas["b"].ttft_s
    assert first_a is not None
    assert (first_a.over, first_a.num) == ("start", 1), "a had no answer between the looks"
    assert first_b is not None
    assert (first_b.over, first_b.num) == ("interval", 10)
    assert 0.1 < first_b.p50 < first_b.p99 <= 0.2
    assert found.all.ttft_s == first_b, "the 9 s are of before"
    assert found.all.itl_s is None
    assert found.all.is_up


def test_look_quantiles_lie_in_the_bucket_of_the_true_ones() -> None:
    (metrics,) = metrics_of("a")
    chance = random.Random(1)
    values = sorted(chance.lognormvariate(-2, 1) for _ in range(5000))
    for value in values:
        metrics.first_token.observe(value)
    found = live.compare(look(0.0, metrics_of("a")), look(1.0, [metrics])).all.ttft_s
    assert found is not None
    bounds = (0.0, *metrics.first_token._upper_bounds)
    for share, told in ((0.5, found.p50), (0.99, found.p99)):
        true = values[int(share * len(values))]
        low, high = next((low, high) for low, high in itertools.pairwise(bounds) if low < true <= high)
        assert low < told <= high
        part = (true - low) / (high - low)
        assert (told - low) / (high - low) == pytest.approx(part, abs=0.35), "and there by how many of the bucket's lie below"


def test_look_time_beyond_the_last_bound_is_told_as_such() -> None:
    (metrics,) = metrics_of("a")
    for value in (0.15, 99.0):
        metrics.first_token.observe(value)
    found = live.compare(look(0.0, metrics_of("a")), look(1.0, [metrics])).all.ttft_s
    assert found is not None
    assert (found.p99, found.is_beyond) == (30.0, True)
    assert status._times(found) == "200 ms / >30.00 s"


def test_look_counter_that_began_anew_and_replica_that_came_give_no_false_rates() -> None:
    old, new, other = metrics_of("a", "a", "b")
    old.generated_tokens.inc(500)
    new.generated_tokens.inc(20)
    other.generated_tokens.inc(1_000_000)  # seen by the second look only, though it has served for long
    found = live.compare(look(0.0, [old]), look(1.0, [new, other]))
    assert {name: one.made_tokens_per_s for name, one in found.replicas.items()} == {"a": 20.0, "b": 0.0}


def test_look_at_vllms_own_server_tells_its_prefix_hits_and_ours_does_not() -> None:
    def vllm(moment_s: float, num_queries: int, num_hits: int) -> live.Look:
        return live.read(VLLM.replace("QUERIES", f"{num_queries}").replace("HITS", f"{num_hits}"), moment_s)

    found = live.compare(vllm(0.0, 100, 10), vllm(1.0, 300, 110))
    assert found.replicas["0"].prefix_hit_rate == live.Share(0.5, "interval")
    assert found.replicas["0"].num_running == 3
    assert live.compare(vllm(0.0, 100, 10), vllm(1.0, 100, 10)).all.prefix_hit_rate == live.Share(0.1, "start")
    (ours,) = metrics_of("a")
    assert live.compare(look(0.0, [ours]), look(1.0, [ours])).all.prefix_hit_rate is None


def test_look_tells_how_many_guessed_tokens_were_right_where_any_were_guessed() -> None:
    def guessing(moment_s: float, num_drafted: int, num_accepted: int) -> live.Look:
        engine = scripted("x", draft_counts=(num_drafted // 3, num_drafted, num_accepted))
        return live.read(make_metrics("toy", engine, Gate(1, 1), "a").text, moment_s)

    def shown(found: live.Live) -> str:
        console = Console(file=StringIO(), width=120)
        console.print(status._view(found, "http://x", console))
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    found = live.compare(guessing(0.0, 30, 30), guessing(1.0, 90, 60))
    assert found.all.acceptance == live.Share(0.5, "interval")
    assert "right: a 50%" in shown(found)
    idle = live.compare(guessing(0.0, 0, 0), guessing(1.0, 0, 0))
    assert idle.all.acceptance is None
    assert "guessed" not in shown(idle)


@pytest.mark.parametrize("text", ["", "<html><body>hello</body></html>", "# TYPE up gauge\nup 1.0\n"])
def test_look_at_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        live.read(text, 0.0)


@pytest.mark.parametrize(("width", "is_wide"), [(120, True), (60, False), (40, False)])
def test_view_fits_the_terminal_and_shows_every_figure(width: int, is_wide: bool) -> None:
    a, b = metrics_of("replica-1", "replica-2")
    a.first_token.observe(0.15)
    found = live.compare(look(0.0, [a, b]), look(1.0, [a, b]))
    console = Console(file=StringIO(), width=width, force_terminal=True, no_color=True)
    console.print(status._view(replace(found, front=live.Front(2, {"replica-1": 1}, {"lost": 3}, {"429": 4})), "http://x", console))
    coloured = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[3" not in coloured, "bold and dim only"
    shown = re.sub(r"\x1b\[\d*m", "", coloured)
    assert max(len(line) for line in shown.splitlines()) <= width
    for text in (*status.COLUMNS, "replica-1", "replica-2", "all"):
        assert text in shown
    flat = " ".join(shown.split())
    assert "150 ms / 199 ms*" in flat
    assert "front: 2 held until a replica is ready, 3 asked again (lost 3), 4 refused (429 4)" in flat
    assert any(line.startswith("replica-1  ") and "150 ms" in line for line in shown.splitlines()) is is_wide


async def slipway_status(*arguments: str, **variables: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pipelines.cli", "status", *arguments]
    environment = {**os.environ, "COLUMNS": "140", **variables}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@asynccontextmanager
async def answering(here: Stand) -> Any:
    """Somebody asks all the time."""

    async def ask() -> None:
        while True:
            await here.post()

    asking = asyncio.create_task(ask())
    yield
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def test_status_command_shows_what_a_server_does_as_a_table_and_as_one_object() -> None:
    async def scene() -> tuple[tuple[int, str, str], ...]:
        async with stand() as here:
            await here.add(scripted("hello"), "a")
            async with answering(here):
                return await slipway_status("--url", here.url), await slipway_status("--url", here.url, "--json")

    (code, table, _), (json_code, text, errors) = asyncio.run(scene())
    assert (code, json_code, errors) == (0, 0, "")
    assert "toy at http" in table
    assert "\x1b" not in table
    found = json.loads(text)
    assert text.count("\n") == 1
    assert found["models"] == ["toy"]
    assert found["replicas"]["r1"] == found["all"]
    assert found["all"]["made_tokens_per_s"] > 0
    assert found["all"]["ttft_s"]["over"] == "interval"
    assert 0 < found["all"]["ttft_s"]["p50"] <= found["all"]["ttft_s"]["p99"]
    assert found["front"].keys() == {"num_held", "in_flight", "retries", "refused"}
    assert 0.5 < found["interval_s"] < 10


def test_status_command_watch_goes_on_until_interrupted() -> None:
    async def scene() -> tuple[int | None, list[Any]]:
        async with stand() as here:
            await here.add(scripted("hello"))
            command = [sys.executable, "-m", "pipelines.cli", "status", "--url", here.url, "--json", "--watch"]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert process.stdout is not None
            seen = [json.loads(await process.stdout.readline()) for _ in range(2)]
            process.send_signal(signal.SIGINT)
            await process.communicate()
            return process.returncode, seen

    code, seen = asyncio.run(scene())
    assert code == 0
    assert [one["models"] for one in seen] == [["toy"]] * 2


def test_status_command_without_a_server_exits_75_and_says_what_to_do() -> None:
    async def scene() -> tuple[tuple[int, str, str], ...]:
        async with stand(open_paths=[]) as closed:
            return (
                await slipway_status("--url", f"http://{HOST}:{free_port()}", "--json"),
                await slipway_status("--url", closed.url),
                await slipway_status("--url", "localhost"),
            )

    (code, out, text), (closed_code, _, closed_text), (bad_code, _, bad_text) = asyncio.run(scene())
    assert (code, out) == (75, "")
    assert "Is `slipway serve` running there?" in text
    assert "Traceback" not in text + closed_text + bad_text
    assert (closed_code, bad_code) == (75, 2)
    assert "--url localhost" in bad_text


def test_status_command_sends_the_key_of_the_environment(tmp_path: Any) -> None:
    from infra import api_keys

    path = tmp_path / "keys.json"
    _, key = api_keys.add(path, "me")

    async def scene() -> tuple[tuple[int, str, str], ...]:
        async with stand(open_paths=[], api_keys_file=path) as here:
            await here.add(scripted("hello"), open_paths=[], api_keys_file=path)
            assert (await here.client.post("/v1/completions", json=BODY)).status_code == 401
            return await slipway_status("--url", here.url, SLIPWAY_API_KEY=""), await slipway_status("--url", here.url, SLIPWAY_API_KEY=key)

    (without, _, text), (with_key, _, _) = asyncio.run(scene())
    assert (without, with_key) == (2, 0)
    assert "SLIPWAY_API_KEY" in text
