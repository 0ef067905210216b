"""How many replicas: the policy alone, a pure function of made-up figures and times."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from infra.config import parse
from infra.errors import ConfigError
from serving.autoscaling.load import RECENT_S, RecentTimes, ReplicaLoad
from serving.autoscaling.policy import TURN_S, Figures, State, decide
from serving.config import AutoscaleConfig, ServeConfig

TICK_S = 0.2
SETTINGS = AutoscaleConfig(max_replicas=4, target_requests=16, target_ttft_s=1.0, up_delay_s=1.0, down_delay_s=120.0, zero_delay_s=300.0)


class Scene:
    """The policy in a world where every replica that it asks for is there at once."""

    def __init__(self, settings: AutoscaleConfig = SETTINGS, num_replicas: int = 1) -> None:
        self.settings = settings
        self.num_replicas = num_replicas
        self.now_s = 1000.0
        self.state = State()
        self.changes: list[tuple[float, int, int]] = []

    def look(self, *loads: ReplicaLoad, num_held: int = 0) -> None:
        """One decision."""
        figures = Figures(self.now_s, self.num_replicas, self.num_replicas, loads, num_held)
        wanted, self.state = decide(self.settings, self.state, figures)
        if wanted != self.num_replicas:
            self.changes.append((self.now_s, self.num_replicas, wanted))
        self.num_replicas = wanted
        self.now_s += TICK_S

    def run(self, duration_s: float, num_requests: int, **more: float) -> None:
        """Decisions for so long, with that many requests over all replicas."""
        for _ in range(round(duration_s / TICK_S)):
            share = num_requests / max(1, self.num_replicas)
            loads = [ReplicaLoad(num_running=share, **more) for _ in range(self.num_replicas)]
            self.look(*loads, num_held=0 if self.num_replicas else num_requests)


def turns(changes: list[tuple[float, int, int]]) -> list[tuple[float, bool]]:
    """When the direction changed, and whether that was a waking from zero."""
    found, last = [], 0
    for time_s, before, after in changes:
        direction = 1 if after > before else -1
        if last == -direction:
            found.append((time_s, before == 0))
        last = direction
    return found


def test_policy_burst_asks_for_what_it_needs_after_the_up_delay_and_no_sooner() -> None:
    scene = Scene()
    scene.run(20, num_requests=1)
    burst_s = scene.now_s
    scene.run(3, num_requests=33)
    assert [(before, after) for _, before, after in scene.changes] == [(1, 3)]
    assert SETTINGS.up_delay_s <= scene.changes[0][0] - burst_s <= SETTINGS.up_delay_s + 2 * TICK_S


def test_policy_burst_shorter_than_the_up_delay_asks_for_nothing() -> None:
    scene = Scene()
    for _ in range(20):
        scene.run(0.8, num_requests=33)
        scene.run(0.4, num_requests=1)
    assert scene.changes == []


def test_policy_goes_down_one_at_a_time_and_a_down_delay_apart() -> None:
    scene = Scene(num_replicas=4)
    scene.run(500, num_requests=1)
    assert [(before, after) for _, before, after in scene.changes] == [(4, 3), (3, 2), (2, 1)]
    gaps_s = [later_s - time_s for time_s, later_s in pairwise([1000.0, *(time_s for time_s, *_ in scene.changes)])]
    assert all(SETTINGS.down_delay_s <= gap_s <= SETTINGS.down_delay_s + 2 * TICK_S for gap_s in gaps_s)


def test_policy_one_busy_look_begins_the_down_delay_anew() -> None:
    scene = Scene(num_replicas=2)
    for _ in range(10):
        scene.run(110, num_requests=1)
        scene.run(TICK_S, num_requests=30)
    assert scene.changes == []


def test_policy_load_that_would_fill_the_remaining_replicas_keeps_them() -> None:
    scene = Scene(num_replicas=2)
    scene.run(400, num_requests=14)  # one replica should have 16 in hand, but with 14 the next few would recall the second
    assert scene.changes == []
    scene.run(400, num_requests=12)
    assert scene.num_replicas == 1


def test_policy_late_first_tokens_add_one_replica_and_wait_for_its_effect() -> None:
    scene = Scene()
    scene.run(RECENT_S + 2, num_requests=8, first_token_s=0.5)
    assert scene.changes == []
    scene.run(RECENT_S - 1, num_requests=8, first_token_s=3.0)
    assert [(before, after) for _, before, after in scene.changes] == [(1, 2)]
    scene.run(RECENT_S, num_requests=8, first_token_s=3.0)
    assert scene.num_replicas == 3


def test_policy_queue_that_waits_too_long_adds_a_replica() -> None:
    scene = Scene()
    scene.run(RECENT_S + 4, num_requests=4, longest_wait_s=2.0)
    assert scene.num_replicas == 2


def test_policy_one_slow_prompt_alone_adds_no_replica() -> None:
    scene = Scene()
    scene.run(100, num_requests=1, first_token_s=30.0)
    assert scene.changes == []


def test_policy_late_answers_keep_what_is_there() -> None:
    scene = Scene(AutoscaleConfig(max_replicas=2), num_replicas=2)
    scene.run(600, num_requests=3, first_token_s=2.0)
    assert scene.num_replicas == 2


def test_policy_late_answers_keep_a_replica_that_is_long_in_starting() -> None:
    state = State()
    for look in range(3000):
        load = ReplicaLoad(num_running=5, first_token_s=3.0)
        wanted, state = decide(SETTINGS, state, Figures(look * TICK_S, 2, 1, (load,)))
        assert wanted == 2


def test_policy_replica_that_has_told_nothing_keeps_all() -> None:
    scene = Scene(num_replicas=3)
    for _ in range(3000):
        scene.look(ReplicaLoad(num_running=1), ReplicaLoad())
    assert scene.changes == []


def test_policy_last_replica_stays_unless_zero_is_allowed() -> None:
    scene = Scene()
    scene.run(2000, num_requests=0)
    assert scene.num_replicas == 1


def test_policy_goes_to_zero_when_idle_long_enough_and_wakes_at_once() -> None:
    scene = Scene(SETTINGS.model_copy(update={"min_replicas": 0}))
    scene.run(SETTINGS.zero_delay_s - 1, num_requests=0)
    assert scene.num_replicas == 1
    scene.run(3, num_requests=0)
    assert scene.num_replicas == 0
    scene.run(5, num_requests=0)
    asked_s = scene.now_s
    scene.look(num_held=1)
    assert scene.changes[-1] == (asked_s, 0, 1)


def test_policy_short_requests_between_two_looks_are_not_taken_for_idleness() -> None:
    scene = Scene(SETTINGS.model_copy(update={"min_replicas": 0}))
    scene.run(2000, num_requests=0, num_recent=1)
    assert scene.num_replicas == 1


def test_policy_replicas_that_start_are_not_asked_for_again() -> None:
    state, now_s, asked = State(), 0.0, []
    for _ in range(100):
        wanted, state = decide(SETTINGS, state, Figures(now_s, asked[-1] if asked else 1, 1, (ReplicaLoad(num_running=31),)))
        asked.append(wanted)
        now_s += TICK_S
    assert set(asked) == {1, 2}


def test_policy_turn_waits_a_minute_after_the_last_turn() -> None:
    scene = Scene(SETTINGS.model_copy(update={"down_delay_s": 1.0}))
    for _ in range(100):
        scene.run(4, num_requests=40)
        scene.run(4, num_requests=1)
    times_s = [time_s for time_s, _ in turns(scene.changes)]
    assert len(times_s) >= 8
    assert all(later_s - time_s >= TURN_S for time_s, later_s in pairwise(times_s))


@pytest.mark.parametrize("seed", range(12))
def test_policy_whatever_the_figures_keeps_its_bounds_and_turns_once_a_minute(seed: int) -> None:
    """Random settings, loads that jump as they like, replicas that come late or die; only a waking from zero may turn sooner."""
    chance = random.Random(seed)
    least = chance.choice((0, 1, 2))
    settings = AutoscaleConfig(
        min_replicas=least,
        max_replicas=least + chance.randint(1, 6),
        target_requests=chance.choice((1, 4, 16)),
        up_delay_s=chance.choice((0.0, 1.0)),
        down_delay_s=chance.choice((0.0, 2.0, 5.0)),
        zero_delay_s=chance.choice((0.0, 5.0)),
    )
    scene, calm = Scene(settings, num_replicas=max(1, least)), 0.0
    for _ in range(5000):
        if chance.random() < 0.01:
            calm = chance.choice((0.0, 0.5, 1.0))
        num_there = max(0, scene.num_replicas - (chance.random() < 0.1))
        loads = [
            ReplicaLoad(chance.randint(0, 40), chance.randint(0, 9), chance.random() * 3, chance.random() * 3, chance.randint(0, 5))
            if chance.random() > calm
            else ReplicaLoad()
            for _ in range(num_there)
        ]
        figures = Figures(scene.now_s, scene.num_replicas, num_there, tuple(loads), chance.randint(0, 9) * (chance.random() > calm))
        wanted, scene.state = decide(settings, scene.state, figures)
        assert settings.min_replicas <= wanted <= settings.max_replicas
        assert wanted >= scene.num_replicas - 1
        if wanted != scene.num_replicas:
            scene.changes.append((scene.now_s, scene.num_replicas, wanted))
        scene.num_replicas = wanted
        scene.now_s += TICK_S
    found = turns(scene.changes)
    assert found
    assert all(later_s - time_s >= TURN_S - 1e-6 or is_wake for (time_s, _), (later_s, is_wake) in pairwise(found))


def test_policy_change_by_another_counts_as_its_own() -> None:
    """Ray Serve wakes the first replica itself: after that, too, nothing may turn for a minute."""
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "zero_delay_s": 0.0})
    idle = Figures(0.0, 1, 1, (ReplicaLoad(),))
    wanted, state = decide(settings, State(), idle)
    assert wanted == 0
    asked = []
    for second in range(5, 80):
        wanted, state = decide(settings, state, replace(idle, now_s=float(second), num_target=1))
        asked.append(wanted)
        if not wanted:
            break
    assert 60 <= len(asked) <= 62


def test_recent_times_forget_what_is_old() -> None:
    now_s = 0.0
    recent = RecentTimes(lambda: now_s)
    for duration_s in (0.1, 0.2, 0.3, 5.0):
        recent.note(duration_s)
    assert recent.figures() == (0.3, 4)
    now_s = RECENT_S + 0.1
    assert recent.figures() == (0.0, 0)


@pytest.mark.parametrize(
    ("given", "first", "most"),
    [
        ({"num_replicas": 3}, 3, 3),
        ({"autoscale": {"max_replicas": 4}}, 1, 4),
        ({"num_replicas": 9, "autoscale": {"max_replicas": 4}}, 4, 4),
        ({"num_replicas": 2, "autoscale": {"min_replicas": 0, "max_replicas": 4}}, 2, 4),
        ({"autoscale": {"min_replicas": 2, "max_replicas": 4}}, 2, 4),
    ],
)
def test_config_replicas_to_begin_with_stay_within_the_bounds(given: dict[str, Any], first: int, most: int) -> None:
    config = ServeConfig.model_validate(given)
    assert (config.first_replicas, config.most_replicas) == (first, most)


def test_config_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_replicas is 3 and max_replicas 2"):
        parse(ServeConfig, {"autoscale": {"min_replicas": 3, "max_replicas": 2}}, "spec")
