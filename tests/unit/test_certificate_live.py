"""What an endpoint says beside the model that it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from infra.cases import Scored
from pipelines.proof.answers import Spoken
from pipelines.proof.bounds import BOUNDS
from pipelines.proof.checks import Check
from pipelines.proof.endpoint import LiveAnswer, token_label
from pipelines.proof.live import check_live, follow
from tests.unit.forced_answers import STOP, case, forced


class Letters:
    """Token ids as letters, the stop token as `<end>`."""

    def token_text(self, token: int) -> str:
        return "<end>" if token == STOP else "\ufffd" if token >= HALVES else chr(ord("a") + token)

    def token_bytes(self, token: int) -> list[int]:
        return [token] if token >= HALVES else list(self.token_text(token).encode())


CODEC: Any = Letters()
HALVES = 0x80
"""From here on tokens are parts of characters, whose texts are all alike."""
SAID = forced((0, 1, STOP), (-0.1, -0.2, -0.3))


def live(*tokens: str, logprobs: Sequence[float] | None = None, has_ended: bool = True, **given: Any) -> LiveAnswer:
    values = tuple(logprobs if logprobs is not None else [-0.1, -0.2, -0.3, -0.4][: len(tokens)])
    told = {"prompt_ids": (1,), "context_tokens": 8, "num_prompt": 1, **given}
    return LiveAnswer(name="x", tokens=tokens, logprobs=values, has_ended=has_ended, **told)


def test_endpoint_that_says_what_its_model_says_is_followed_to_the_end() -> None:
    found = follow(live("a", "b", logprobs=[-0.15, -0.2]), SAID, CODEC, [STOP], 0.1)
    assert (found.differences, found.problem, found.is_same) == (pytest.approx((0.05, 0)), "", True)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (live("a", "z"), "says 'z' at token 1, where its model says 'b': another model is served"),
        (live("a", "b", "c"), "goes on at token 2, where its model stops: other stop ids at the server"),
        (live("a", "b", "<end>", "c", has_ended=False), "says '<end>' at token 2 and goes on: other stop ids at the server"),
        (live("a"), "stops at token 1, where its model goes on: other stop ids at the server"),
    ],
)
def test_endpoint_that_says_something_else_is_named(answer: LiveAnswer, problem: str) -> None:
    assert follow(answer, SAID, CODEC, [STOP], 0.1).problem == problem


def test_endpoint_that_says_another_part_of_a_character_has_left_the_answer() -> None:
    own = forced((0xE2, 1, STOP), (-0.1, -0.2, -0.3))
    same = follow(live(token_label("\ufffd", [0xE2]), "b"), own, CODEC, [STOP], 0.1)
    other = follow(live(token_label("\ufffd", [0xC3]), "z"), own, CODEC, [STOP], 0.1)
    assert (same.problem, same.is_same) == ("", True)
    assert other.problem == "says 'c3' at token 0, where its model says 'e2': another model is served"


def test_endpoint_may_say_its_own_likeliest_token_where_the_trained_model_would_never() -> None:
    own = SAID.model_copy(update={"best_ids": (0, 25, STOP)})
    assert follow(live("a", "z"), own, CODEC, [STOP], 0.1).problem == ""


def live_checks(answer: LiveAnswer) -> dict[str, Check]:
    own = {"x": Scored(name="x", prompt_ids=(1,), forced=(SAID,))}
    spoken = {"x": Spoken((0, 1), True)}
    found = check_live("m live", [case()], {"x": answer}, own, own, spoken, CODEC, [STOP], 8, BOUNDS["live"])
    return {check.name: check for check in found}


def test_endpoint_as_it_should_be_passes_every_check() -> None:
    assert all(check.passed for check in live_checks(live("a", "b")).values())


def test_endpoint_that_runs_past_a_likely_stop_is_named_though_such_a_tie_would_be_within_the_bounds() -> None:
    own = forced((0, 1, STOP), (-0.1, -0.2, -0.03)).model_copy(
        update={"top_ids": ((0,), (1,), (STOP, 7)), "top_logprobs": ((-0.1,), (-0.2,), (-0.03, -3.4))}
    )
    scored = {"x": Scored(name="x", prompt_ids=(1,), forced=(own,))}
    said = live("a", "b", "h", logprobs=[-0.1, -0.2, -3.4], has_ended=False)
    found = check_live("m live", [case()], {"x": said}, scored, scored, {"x": Spoken((0, 1), True)}, CODEC, [STOP], 8, BOUNDS["live"])
    (answers,) = [check for check in found if check.name == "answers"]
    assert answers.cause == "'x': goes on at token 2, where its model stops: other stop ids at the server"


@pytest.mark.parametrize(
    ("answer", "name", "cause"),
    [
        (live("a", "b", context_tokens=4), "context", "context length cut"),
        (live("a", "b", num_prompt=2), "context", "a BOS was added"),
        (live("a", "b", prompt_ids=(1, 1), num_prompt=2), "prompt ids", "a BOS was added twice"),
        (live("a", "b", logprobs=[-0.1, -9]), "log-probabilities", "another model is served"),
        (live("a", "z"), "answers", "another model is served"),
    ],
)
def test_endpoint_with_one_fault_fails_that_check_alone(answer: LiveAnswer, name: str, cause: str) -> None:
    found = live_checks(answer)
    assert [each.name for each in found.values() if not each.passed] == [name]
    assert cause in found[name].cause
