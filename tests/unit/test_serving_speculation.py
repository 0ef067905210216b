"""When guessing ahead is on and off, over steps with made-up times; and what prompt look-up finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import ServeConfig, SpeculativeConfig
from serving.engines.vllm_guesses import VllmGuesses, guesses_config
from serving.speculation import HELD_STEPS, JUDGED_DRAFTS, TRIAL_STEPS, Speculation, look_up

NUM_GUESSED = 3


def run(speculation: Speculation, num_steps: int, num_accepted: int, cost: float, num_requests: int = 1) -> int:
    """Steps at one load, in which a step with guesses takes `cost` times as long; how many had guesses."""
    num_guessing = 0
    for _ in range(num_steps):
        is_on = speculation.wants(num_requests)
        drafts = [(NUM_GUESSED, num_accepted)] * num_requests if is_on else []
        speculation.note(num_requests, is_on, drafts, num_requests * (1 + num_accepted * is_on), 0.01 * (cost if is_on else 1.0))
        num_guessing += is_on
    return num_guessing


def test_speculation_that_is_faster_stays_on_but_for_trials_of_the_other_way() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.1)
    run(speculation, 2 * TRIAL_STEPS, num_accepted=2, cost=1.5)
    assert run(speculation, HELD_STEPS, num_accepted=2, cost=1.5) == HELD_STEPS
    assert run(speculation, TRIAL_STEPS, num_accepted=2, cost=1.5) == 0
    assert run(speculation, HELD_STEPS, num_accepted=2, cost=1.5) == HELD_STEPS


def test_speculation_that_is_slower_goes_off_though_guesses_are_right() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.1)
    run(speculation, 2 * TRIAL_STEPS, num_accepted=1, cost=2.5)
    assert run(speculation, HELD_STEPS, num_accepted=1, cost=2.5) == 0
    assert run(speculation, TRIAL_STEPS + HELD_STEPS, num_accepted=1, cost=2.5) == TRIAL_STEPS


def test_wrong_guesses_end_a_trial_early() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.1)
    assert run(speculation, JUDGED_DRAFTS + HELD_STEPS, num_accepted=0, cost=1.2) == JUDGED_DRAFTS
    assert run(speculation, TRIAL_STEPS, num_accepted=0, cost=1.2) == JUDGED_DRAFTS


def test_speculation_comes_back_once_it_pays() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.1)
    run(speculation, JUDGED_DRAFTS + HELD_STEPS, num_accepted=0, cost=1.2)
    assert run(speculation, TRIAL_STEPS + HELD_STEPS, num_accepted=3, cost=1.2) == TRIAL_STEPS + HELD_STEPS


def test_each_load_is_judged_by_its_own_steps() -> None:
    speculation = Speculation(max_requests=8, min_acceptance=0.1)
    run(speculation, 2 * TRIAL_STEPS, num_accepted=2, cost=1.5, num_requests=1)
    run(speculation, 2 * TRIAL_STEPS, num_accepted=2, cost=4.0, num_requests=7)
    assert speculation.wants(1)
    assert not speculation.wants(7)
    assert not speculation.wants(8)


def test_more_requests_than_the_bound_are_never_guessed_for() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.0)
    assert run(speculation, TRIAL_STEPS, num_accepted=3, cost=1.0, num_requests=5) == 0
    assert speculation.wants(4)


def test_steps_that_say_nothing_about_speed_are_counted_and_decide_nothing() -> None:
    speculation = Speculation(max_requests=4, min_acceptance=0.1)
    for _ in range(10 * TRIAL_STEPS):
        speculation.note(2, None, [(NUM_GUESSED, 0)], 2, 0.01)
    assert speculation.wants(2)
    assert speculation.counts == (10 * TRIAL_STEPS, 10 * TRIAL_STEPS * NUM_GUESSED, 0)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9]),
        ([7, 3, 5, 1, 2, 3, 6, 2, 3], [6, 2]),  # two tokens agree there, one elsewhere
        ([3, 5, 6, 3, 8, 9, 3], [8, 9]),  # the latest place
        ([4, 4], [4]),
        ([1, 2, 3], []),
        ([1], []),
        ([], []),
    ],
)
def test_look_up_gives_what_followed_the_longest_and_latest_run(ids: list[int], found: list[int]) -> None:
    assert look_up(ids, num_tokens=2, max_ngram_size=3) == found


@pytest.mark.parametrize(
    "wrong", [{"kind": "draft"}, {"draft_model_dir": "small"}, {"num_tokens": 0}, {"max_requests": 0}, {"min_acceptance": 1.0}]
)
def test_speculative_config_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ServeConfig.model_validate({"speculative": wrong})


class Scheduler:
    """Of vLLM's, what is set and called: `dynamic_sd_lookup` by the number of requests, and one call for each request with guesses."""

    def __init__(self) -> None:
        self.dynamic_sd_lookup = [3] * 17
        self.make_spec_decoding_stats: Any = None

    def step(self, drafts: Sequence[tuple[int, int]], struck: Mapping[str, int] | None = None) -> None:
        for request, (num_drafted, num_accepted) in enumerate(drafts):
            stats = self.make_spec_decoding_stats(
                None,
                num_draft_tokens=num_drafted,
                num_accepted_tokens=num_accepted,
                num_invalid_spec_tokens=struck,
                request_id=f"{request}",
            )
            assert stats is None


def test_vllm_is_told_before_each_step_and_its_scheduler_tells_what_was_right() -> None:
    scheduler = Scheduler()
    guesses = VllmGuesses(scheduler, SpeculativeConfig(max_requests=4))
    table = scheduler.dynamic_sd_lookup
    for num_requests, tokens in ((1, 3), (4, 3), (5, 0), (16, 0), (2, 3)):
        guesses.begin(num_requests)
        assert set(table) == {tokens}
        scheduler.step([(3, 1), (3, 3)], struck={"1": 2})
        guesses.end(num_requests, True, 4)
    assert guesses.counts == (10, 20, 20)


@pytest.mark.parametrize(("config", "settings"), [
    (SpeculativeConfig(), {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}),
    (SpeculativeConfig(kind="draft", draft_model_dir=Path("small")), {"method": "draft_model", "model": "small"}),
])  # fmt: skip
def test_vllm_gets_its_own_settings(config: SpeculativeConfig, settings: dict[str, Any]) -> None:
    found = guesses_config(config)
    (table,) = found.pop("num_speculative_tokens_per_batch_size")
    assert found == {"num_speculative_tokens": 3, **settings}
    assert (table[0], table[2]) == (1, 3)
