"""Loads replayed in simulated time: our policy against Ray Serve's own on the same requests."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from infra.errors import ConfigError
from serving.autoscaling.bench import make_scalers
from serving.autoscaling.machine import Machine, Speed
from serving.autoscaling.policy import TURN_S
from serving.autoscaling.scalers import OurScaler, RayScaler
from serving.autoscaling.simulator import Outcome, simulate
from serving.autoscaling.traces import Request, Trace, burst, make_traces, on_off, read_trace, steady
from serving.config import AutoscaleConfig

SETTINGS = AutoscaleConfig(max_replicas=4)
TO_ZERO = AutoscaleConfig(min_replicas=0, max_replicas=4, down_delay_s=30.0, zero_delay_s=60.0)
SPEED = Speed()


def least_gap_s(outcome: Outcome) -> float:
    """The shortest time between a change of direction and the next one that is not a waking from zero."""
    turns = outcome.turns
    return min((later.time_s - turn.time_s for turn, later in pairwise(turns) if not later.is_wake), default=float("inf"))


def run_machine(machine: Machine, until_s: float) -> list[float]:
    firsts_s = []
    while machine.next_s <= until_s:
        firsts_s += machine.advance(machine.next_s)
    return firsts_s + machine.advance(until_s)


@pytest.mark.parametrize(("num_streams", "rate"), SPEED.tokens_per_s)
def test_machine_streams_together_make_the_measured_tokens_a_second(num_streams: int, rate: float) -> None:
    machine, num_tokens = Machine(Speed(prompt_tokens_per_s=1e9), 0, 0.0), 4000
    for _ in range(num_streams):
        assert machine.take(Request(0.0, 1, num_tokens))
    while machine.num_requests:
        machine.advance(machine.next_s)
    assert num_streams * num_tokens / machine.now_s == pytest.approx(rate, rel=0.02)


def test_machine_full_queue_refuses_and_the_rest_is_answered_in_order() -> None:
    machine = Machine(Speed(num_places=2, num_seats=3), 0, 0.0)
    assert [machine.take(Request(0.0, 100, 50)) for _ in range(7)] == [True] * 5 + [False] * 2
    assert machine.load().num_waiting == 3
    firsts_s = run_machine(machine, 60.0)
    assert len(firsts_s) == 5
    assert firsts_s == sorted(firsts_s)
    assert machine.num_requests == 0


def test_machine_one_request_takes_its_prompt_and_its_steps() -> None:
    machine = Machine(SPEED, 0, 0.0)
    machine.take(Request(0.0, 400, 103))
    (first_s,) = run_machine(machine, 0.5)
    assert first_s == pytest.approx(400 / SPEED.prompt_tokens_per_s + 1 / 102)
    assert machine.next_s == pytest.approx(first_s + 102 / 102)


@pytest.mark.parametrize("settings", [SETTINGS, TO_ZERO], ids=["one_stays", "to_zero"])
@pytest.mark.parametrize("seed", range(2))
def test_our_policy_on_every_trace_keeps_its_bounds_and_turns_once_a_minute(settings: AutoscaleConfig, seed: int) -> None:
    for trace in make_traces(seed):
        outcome = simulate(trace, OurScaler(settings), SPEED)
        assert len(outcome.first_tokens_s) + outcome.num_refused == len(trace.requests)
        assert all(settings.min_replicas <= change.after <= settings.max_replicas for change in outcome.changes)
        assert all(change.after >= change.before - 1 for change in outcome.changes)
        assert least_gap_s(outcome) >= TURN_S


@pytest.mark.parametrize("seed", range(3))
def test_our_policy_asks_for_the_second_replica_within_three_seconds_of_a_burst(seed: int) -> None:
    for tenth in range(0, 10, 3):  # wherever the burst falls between two reports
        outcome = simulate(burst(seed, burst_s=120.0 + tenth / 10), OurScaler(SETTINGS), SPEED)
        (reaction_s,) = outcome.reactions_s
        assert reaction_s is not None
        assert 0 < reaction_s <= 3.0


def test_our_policy_reacts_sooner_than_rays_and_answers_sooner() -> None:
    for trace in (burst(0), on_off(0)):
        ours, rays = simulate(trace, OurScaler(SETTINGS), SPEED), simulate(trace, RayScaler(SETTINGS), SPEED)
        assert max(reaction_s or 1e9 for reaction_s in ours.reactions_s) < min(reaction_s or 1e9 for reaction_s in rays.reactions_s)
        assert ours.summary(1.0)["ttft_p99_s"] < rays.summary(1.0)["ttft_p99_s"]


def test_our_policy_on_a_steady_load_leaves_the_replicas_alone() -> None:
    assert simulate(steady(0), OurScaler(SETTINGS), SPEED).changes == []


def test_our_policy_goes_to_zero_between_the_phases_and_wakes_for_the_next() -> None:
    outcome = simulate(on_off(0), OurScaler(TO_ZERO), SPEED)
    wakes = [change for change in outcome.changes if change.is_wake]
    assert len(wakes) == 5
    assert len(outcome.first_tokens_s) == len(outcome.trace.requests)


def test_ray_policy_waits_its_own_delays_before_it_changes_anything() -> None:
    """With Ray's defaults: 30 s above the target before going up, 600 s below it before going down."""
    calm = tuple(Request(float(second), 60, 20) for second in range(1000))
    wave = tuple(Request(60.0 + index / 20, 60, 120) for index in range(2400))
    trace = Trace("wave", 1000.0, tuple(sorted(calm + wave, key=lambda request: request.arrival_s)), (60.0,))
    outcome = simulate(trace, RayScaler(SETTINGS), SPEED)
    up, *_, down = outcome.changes
    assert 30 <= up.time_s - 60 <= 30 + 20
    assert down.after < down.before
    assert 600 <= down.time_s - 180 <= 600 + 60


def test_replay_of_the_same_trace_gives_the_same_outcome() -> None:
    def summaries() -> list[object]:
        return [simulate(burst(7), scaler, SPEED).summary(1.0) for scaler in make_scalers(SETTINGS).values()]

    assert summaries() == summaries()


def test_trace_of_a_file_is_replayed_and_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n2.5,10,3\n0.5,7,2\n")
    assert read_trace(path).requests == (Request(0.5, 7, 2), Request(2.5, 10, 3))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,7,2\nnan,7,2\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_trace(path)
    path.write_text("time,prompt\n1,2\n")
    with pytest.raises(ConfigError, match="arrival_s, prompt_tokens, output_tokens are needed"):
        read_trace(path)


def test_bench_command_prints_one_object_with_every_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{index / 20},60,120\n" for index in range(2000)))
    command = [sys.executable, "-m", "pipelines.cli", "bench", "autoscale", "--json", "--trace", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["synthetic"] is False
    assert set(figures["traces"]) == {"mine"}
    for policy in ("slipway", "ray", "ray_our_delays"):
        assert {"reaction_s", "ttft_p50_s", "ttft_p99_s", "replica_s", "turns"} <= set(figures["traces"]["mine"][policy])
