"""How many replicas a load needs: the simulated fleet against figures that were measured, and the search against its own definition."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from infra.errors import ConfigError
from serving.autoscaling.load import ReplicaLoad
from serving.autoscaling.machine import Machine, Speed
from serving.autoscaling.simulator import simulate
from serving.autoscaling.traces import Request, Trace
from serving.capacity.curves import Curve, Node, find_curve, read_measured
from serving.capacity.demand import Demand
from serving.capacity.fleet import Fleet
from serving.capacity.sizing import MOST_BUSY, NUM_REQUESTS, busy_replicas, keep, plan, smallest
from serving.capacity.table import LOADS, table, with_table

README = Path(__file__).parents[2] / "helm" / "serving" / "README.md"
MEASURED = read_measured()
CPU, H100 = MEASURED.curves["openvino-int8-135m"], MEASURED.curves["vllm-h100-gpt-oss-20b"]
NODE = MEASURED.nodes["cpu-16"]


class Fixed:
    """A scaler that leaves the replicas alone."""

    record_s = push_s = 10.0

    def record(self, now_s: float, num_held: int, loads: Mapping[int, ReplicaLoad]) -> None:
        """Nothing is noted."""

    def push(self, now_s: float) -> None:
        """Nothing is sent."""

    def decide(self, now_s: float, num_target: int, running: Sequence[int]) -> int:
        """As many as there are."""
        return num_target


def closed_loop(curve: Curve, num_clients: int, num_prompt: int, num_new: int, num_requests: int) -> tuple[float, float, float]:
    """Requests/s, and the median seconds to the first token and between tokens, of clients that each ask again once they are answered."""
    machine, num_given, firsts_s = Machine(curve.speed, 0, 0.0), 0, []
    while machine.num_requests or num_given < num_requests:
        while machine.num_requests < num_clients and num_given < num_requests:
            machine.take(Request(machine.now_s, num_prompt, num_new))
            num_given += 1
        firsts_s += machine.advance(machine.next_s)
    middle = num_requests // 2
    return num_requests / machine.now_s, sorted(firsts_s)[middle], sorted(machine.gaps_s)[middle]


@pytest.mark.parametrize(("num_clients", "requests_per_s", "gap_s"), [(16, 16.2, None), (256, 59.05, 0.0243)])
def test_curve_fitted_to_published_figures_gives_them_in_the_simulator(
    num_clients: int, requests_per_s: float, gap_s: float | None
) -> None:
    found, first_s, found_gap_s = closed_loop(H100, num_clients, 512, 128, 12 * num_clients)
    assert found == pytest.approx(requests_per_s, rel=0.03)
    if gap_s is not None:
        assert found_gap_s == pytest.approx(gap_s, rel=0.03)
        assert first_s == pytest.approx(1.234, rel=0.05)


@pytest.mark.parametrize("name", [name for name, curve in MEASURED.curves.items() if not curve.gpus_per_replica])
def test_curve_that_was_measured_gives_its_rates_in_the_simulator_less_the_prompts(name: str) -> None:
    curve = MEASURED.curves[name]
    for num_streams, rate in curve.tokens_per_s.items():
        found, _, _ = closed_loop(curve, num_streams, 25, 128, num_streams)
        assert 0.88 * rate < 128 * found <= rate


def test_curve_of_the_simulators_defaults_is_the_one_that_comes_along() -> None:
    assert CPU.speed == Speed()


def test_fleet_of_one_replica_gives_the_same_first_tokens_as_the_simulator_of_autoscaling() -> None:
    requests = Demand(tokens_per_s=700, ttft_s=1).requests(800)
    trace = Trace("same", requests[-1].arrival_s + 60, tuple(requests))
    slow = simulate(trace, Fixed(), CPU.speed, first_replicas=1)
    fast = Fleet(CPU.speed, 1).replay(requests)
    assert sorted(first_s for _, first_s in fast.first_tokens_s) == pytest.approx(sorted(slow.first_tokens_s))
    assert len(fast.gaps_s) == sum(request.output_tokens > 1 for request in requests)


def test_demand_asks_for_as_many_tokens_a_second_as_it_says() -> None:
    requests = Demand(tokens_per_s=3000, ttft_s=1, answer_tokens=40).requests(20_000)
    assert sum(request.output_tokens for request in requests) / requests[-1].arrival_s == pytest.approx(3000, rel=0.03)
    assert sorted(request.output_tokens for request in requests)[10_000] == pytest.approx(40, rel=0.05)


def test_fleet_that_is_busy_all_the_time_loses_ground_and_one_at_the_limit_of_plans_does_not() -> None:
    """The number that `busy_replicas` gives, against long replays of one replica."""

    def last_firsts_s(share: float) -> float:
        demand = Demand(tokens_per_s=1000, ttft_s=1)
        demand = Demand(tokens_per_s=1000 * share / busy_replicas(CPU, demand), ttft_s=1)
        firsts_s = [first_s for _, first_s in Fleet(CPU.speed, 1).replay(demand.requests(3000)).first_tokens_s]
        return sum(firsts_s[-300:]) / 300

    assert last_firsts_s(1.1) > 10
    assert last_firsts_s(MOST_BUSY) < 5


@pytest.mark.parametrize("ttft_s", [0.2, 1.0])
def test_smallest_fleet_is_enough_and_one_fewer_is_not(ttft_s: float) -> None:
    demand = Demand(tokens_per_s=4000, ttft_s=ttft_s)
    kept = smallest(CPU, demand)
    assert not isinstance(kept, str)
    assert kept.ttft_share_s <= ttft_s
    requests = demand.requests(NUM_REQUESTS)
    assert keep(CPU, demand, requests, kept.num_replicas).is_enough
    assert not keep(CPU, demand, requests, kept.num_replicas - 1).is_enough


def test_smallest_fleet_grows_with_the_load_and_with_what_is_asked_of_it() -> None:
    def needed(**asked: float) -> int:
        kept = smallest(CPU, Demand(**{"tokens_per_s": 3000, "ttft_s": 1.0, **asked}))
        assert not isinstance(kept, str)
        return kept.num_replicas

    usual = needed()
    assert needed(tokens_per_s=1000) < usual < needed(tokens_per_s=9000)
    assert needed(itl_s=0.012) > usual
    assert needed(prompt_tokens=400) > usual


def test_plan_counts_spare_replicas_nodes_and_their_price() -> None:
    demand = Demand(tokens_per_s=5000, ttft_s=1, spare=2)
    made = plan("cpu", CPU, "cpu-16", NODE, demand)
    assert made.kept is not None
    assert made.num_replicas == made.kept.num_replicas + 2
    assert made.num_nodes == -(-made.num_replicas // 7)  # 16 cores less 1, two a replica
    assert made.usd_per_hour == pytest.approx(made.num_nodes * 0.70)
    assert made.usd_per_million_tokens == pytest.approx(made.usd_per_hour / (5000 * 3600) * 1e6, abs=1e-5)
    assert plan("cpu", CPU, "mine", Node(cpus=16), demand).usd_per_hour is None


def test_plan_on_gpu_nodes_takes_as_many_replicas_as_there_are_gpus() -> None:
    made = plan("gpu", H100, "h100-8", MEASURED.nodes["h100-8"], Demand(tokens_per_s=60_000, ttft_s=1))
    assert made.num_replicas is not None
    assert made.num_nodes == -(-made.num_replicas // 8)


def test_node_takes_as_many_replicas_as_its_cores_and_its_gpus_both_allow() -> None:
    large = H100.model_copy(update={"gpus_per_replica": 2})
    assert Node(cpus=192, gpus=8).num_replicas(large) == 4
    assert Node(cpus=17, gpus=8).num_replicas(large) == 2
    assert Node(cpus=192).num_replicas(large) == 0
    assert Node(cpus=0.5).num_replicas(CPU) == 0


@pytest.mark.parametrize(
    ("demand", "node", "reason"),
    [
        (Demand(tokens_per_s=100, ttft_s=0.01), NODE, "an idle replica alone takes .* to begin"),
        (Demand(tokens_per_s=100, ttft_s=1, itl_s=0.001), NODE, "an idle replica alone takes .* a token"),
        (Demand(tokens_per_s=5_000_000, ttft_s=1), NODE, "more than 1000 replicas"),
        (Demand(tokens_per_s=100, ttft_s=1), Node(cpus=2), "a replica needs 2 cores and 0 GPUs; a node has 2 less 1"),
    ],
)
def test_plan_that_nothing_can_keep_says_why(demand: Demand, node: Node, reason: str) -> None:
    made = plan("cpu", CPU, "mine", node, demand)
    assert made.kept is None
    assert re.search(reason, made.reason or "")


def test_curve_without_one_stream_or_with_rates_that_fall_is_refused() -> None:
    known = CPU.model_dump()
    with pytest.raises(ValidationError, match="One stream"):
        Curve(**{**known, "tokens_per_s": {4: 400.0}})
    with pytest.raises(ValidationError, match="falls to 100"):
        Curve(**{**known, "tokens_per_s": {1: 100.0, 4: 400.0, 16: 100.0}})


def test_curve_is_found_by_name_or_file_and_else_the_refusal_says_which_there_are(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(CPU.model_dump()))
    assert find_curve(str(mine), MEASURED) == ("mine", CPU)
    mine.write_text(yaml.safe_dump(CPU.model_dump() | {"node": "moon"}))
    with pytest.raises(ConfigError, match="node is 'moon', and there are cpu-16"):
        find_curve(str(mine), MEASURED)
    with pytest.raises(ConfigError, match="there are openvino-int8-135m"):
        find_curve("openvino", MEASURED)
    with pytest.raises(ConfigError, match="bench curve"):
        find_curve(str(tmp_path / "none.yaml"), MEASURED)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.cli", "plan", *options], capture_output=True, text=True, check=False)


def test_plan_command_prints_replicas_nodes_and_cost() -> None:
    options = ["--tokens-per-s", "2000", "--ttft", "1", "--curve", "openvino-int8-135m", "--node-usd-per-hour", "0.5", "--node-cpus", "9"]
    done = run(*options, "--json")
    assert done.returncode == 0, done.stderr
    (made,) = json.loads(done.stdout)["plans"]
    assert (made["num_replicas"], made["num_nodes"], made["usd_per_hour"]) == (4, 1, 0.5)
    shown = run(*options).stdout
    assert "3 + 1" in shown
    assert "measured for this project" in shown


def test_plan_command_that_nothing_can_keep_exits_2_and_an_unknown_node_too() -> None:
    done = run("--tokens-per-s", "2000", "--ttft", "0.001")
    assert done.returncode == 2
    assert "no plan: an idle replica alone takes" in done.stdout
    unknown = run("--tokens-per-s", "10", "--ttft", "1", "--node", "moon")
    assert unknown.returncode == 2
    assert "there are cpu-16, h100-8" in unknown.stderr


def test_table_in_the_charts_readme_is_what_plans_say_today() -> None:
    assert table(LOADS[:3]).strip() in README.read_text()


@pytest.mark.slow
def test_whole_table_in_the_charts_readme_is_what_plans_say_today() -> None:
    text = README.read_text()
    assert with_table(text, table()) == text


def test_table_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no place for the table"):
        with_table("# A README\n", "| rows |\n")
