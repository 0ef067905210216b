"""Log-probabilities of two stages beside each other, and greedy answers beside what their own model says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from infra.cases import Forced, Scored
from pipelines.proof.answers import Spoken, check_answers
from pipelines.proof.bounds import BOUNDS, precision_of
from pipelines.proof.checks import Check
from pipelines.proof.differences import check_effect, check_logprobs, differences, kl
from tests.unit.forced_answers import STOP, case, forced, scored

# Log-probabilities


def test_kl_of_the_same_is_zero_and_of_others_that_of_the_collapsed_distributions() -> None:
    p, q = (math.log(0.5), math.log(0.3)), (math.log(0.25), math.log(0.5))
    assert kl(p, p) == 0
    assert kl(p, q) == pytest.approx(0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.2 / 0.25))


def test_differences_are_over_the_tokens_that_both_were_forced_through() -> None:
    one = scored(-1.0, -2.0) | scored(-1.0, name="only here")
    found = differences(one, scored(-1.5, -2.0) | scored(-9.0, ids=[4], name="only there"))
    assert (found.num_tokens, found.mean, found.max, found.worst_case) == (2, 0.25, 0.5, "x")


def test_logprobs_within_the_bounds_pass_and_just_beyond_are_refused() -> None:
    bounds = BOUNDS["f32"].model_copy(update={"mean": 0.25, "max": 0.5, "kl": 1.0})
    near, far = scored(-1.5, -2.0), scored(-1.5, -2.01)
    assert check_logprobs("m", scored(-1.0, -2.0), near, {}, bounds, "adapter").passed
    check = check_logprobs("m", scored(-1.0, -2.0), far, {}, bounds, "adapter")
    assert not check.passed
    assert "another run's, a damaged or swapped file" in check.cause


@pytest.mark.parametrize("name", ["mean", "max", "kl"])
def test_logprobs_beyond_one_bound_alone_are_refused(name: str) -> None:
    bounds = BOUNDS["f32"].model_copy(update={"mean": 9.0, "max": 9.0, "kl": 9.0})
    one, other = scored(-1.0, -2.0), scored(-1.5, -2.0)
    assert check_logprobs("m", one, other, {}, bounds, "adapter").passed
    assert not check_logprobs("m", one, other, {}, bounds.model_copy(update={name: 0.0}), "adapter").passed


@pytest.mark.parametrize(
    ("stage", "cause"),
    [
        (scored(-3.0, -4.0), "0% of what training changed is left, so it is the base: the adapter was not loaded or not merged"),
        (scored(-2.0, -3.0), "50% of what training changed is there: wrong alpha or scaling"),
        (scored(1.0, 0.0), "200% of what training changed is there"),
        (scored(math.nan, -2.0), "not finite"),
        ({}, "not one answer could be compared"),
    ],
)
def test_logprobs_that_differ_name_what_is_missing(stage: dict[str, Scored], cause: str) -> None:
    check = check_logprobs("m", scored(-1.0, -2.0), stage, scored(-3.0, -4.0), BOUNDS["merge"], "adapter")
    assert not check.passed
    assert cause in check.cause


def test_logprobs_that_differ_at_the_long_chat_alone_name_rope_scaling() -> None:
    trained = scored(-1.0) | scored(-1.0, name="long")
    check = check_logprobs("m", trained, scored(-1.0) | scored(-2.0, name="long"), scored(-5.0), BOUNDS["merge"], "adapter")
    assert "rope scaling" in check.cause


def test_trained_model_that_is_the_base_has_no_effect() -> None:
    noise = BOUNDS["f32"]
    assert check_effect("adapter", scored(-1.0), scored(-3.0), noise).passed
    check = check_effect("adapter", scored(-1.0), scored(-1.0001), noise)
    assert not check.passed
    assert "the adapter was not loaded" in check.cause


def test_every_weight_format_has_bounds_and_coarser_ones_are_wider() -> None:
    formats = ("bf16", "openvino-int8", "openvino-int4", "openvino-int4-awq", "bnb-int8", "bnb-nf4", "vllm-bf16")
    assert [precision_of(each) for each in formats] == ["bf16", "int8", "int4", "int4", "int8", "int4", "bf16"]
    assert BOUNDS["f32"].mean < BOUNDS["merge"].mean < BOUNDS["bf16"].mean < BOUNDS["int8"].mean < BOUNDS["int4"].mean


# Answers


def answers_check(said: Spoken, stage: Forced, slack: float = 0.1) -> Check:
    reference = Spoken((10, 11), has_ended=True)
    found = {"x": Scored(name="x", prompt_ids=(1,), forced=(stage,))}
    return check_answers("m", [case()], {"x": said}, {"x": reference}, found, [STOP], slack)


def test_answers_that_follow_the_stages_own_model_pass() -> None:
    same = forced((10, 11, STOP), (-0.1, -0.1, -0.1))
    assert answers_check(Spoken((10, 11), True), same).passed
    turned = forced((10, 11, STOP), (-0.1, -2.0, -0.1), best=(10, 55, STOP))
    assert answers_check(Spoken((10, 55, 7, 8), False), turned).passed
    assert answers_check(Spoken((10,), False), same).passed  # cut at its longest
    assert answers_check(Spoken((10, 99), False), same, slack=1.5).passed  # a tie


@pytest.mark.parametrize(
    ("said", "best", "cause"),
    [
        (Spoken((10, 33), True), None, "says 33 at token 1, where its own model says 11: answers of another model or run"),
        (Spoken((10, 11, 12), False), None, "goes on at token 2, where its own model stops: other stop ids"),
        (Spoken((10,), True), None, "stops at token 1, where its own model goes on: other stop ids"),
        (Spoken((10, 11, STOP, 12), False), None, "goes on after token 2, where its own model stops: other stop ids"),
    ],
)
def test_answers_that_do_not_follow_name_the_token(said: Spoken, best: Any, cause: str) -> None:
    check = answers_check(said, forced((10, 11, STOP), (-0.1, -0.1, -0.1), best=best))
    assert not check.passed
    assert cause in check.cause
