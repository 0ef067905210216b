"""Token ids of each stage beside those of training, what each stage is asked, and how a client asks it."""

from __future__ import annotations

import pytest

from infra.cases import Ask, Scored, asks, client_message
from pipelines.proof.encodings import Encoder, check_prompt_ids
from tests.unit.forced_answers import STOP, case

ENCODER = Encoder(template="t" * 64, tokenizer="k" * 64, special_tokens={"bos_token": "<s>"})


def prompts(ids: tuple[int, ...] = (), refusal: str = "") -> dict[str, Scored]:
    return {"x": Scored(name="x", prompt_ids=ids, refusal=refusal)}


def test_prompt_ids_that_are_the_same_pass() -> None:
    check = check_prompt_ids("merged", [case()], prompts((1, 2)), prompts((1, 2)), (ENCODER, ENCODER))
    assert (check.passed, check.found) == (True, "1 of 1 are the same tokens")


@pytest.mark.parametrize(
    ("other", "own", "cause"),
    [
        (
            prompts((1, 2, 4)),
            ENCODER.model_copy(update={"template": "e" * 64}),
            "position 2 (4 here, 3 in training): the chat template of m",
        ),
        (prompts((1, 2)), ENCODER.model_copy(update={"tokenizer": "e" * 64}), "position 2 (none here, 3 in training): the tokenizer of m"),
        (prompts((7, 1, 2, 3)), ENCODER, "begins with one token more, 7: a BOS was added twice"),
        (prompts((2, 3)), ENCODER, "begins with one token less, 1: a BOS is missing"),
        (prompts(refusal="no system"), ENCODER, "this stage refuses the chat 'x': no system"),
        (prompts((9, 9, 9)), ENCODER.model_copy(update={"special_tokens": {}}), "its special tokens differ"),
        (prompts((9, 9, 9)), ENCODER, "training rendered with another template or tokenizer than the base holds now"),
    ],
)
def test_prompt_ids_that_differ_name_the_position_and_the_file(other: dict[str, Scored], own: Encoder, cause: str) -> None:
    check = check_prompt_ids("m", [case()], prompts((1, 2, 3)), other, (ENCODER, own))
    assert not check.passed
    assert cause in check.cause


def test_prompt_ids_of_a_dataset_row_are_those_that_training_rendered() -> None:
    check = check_prompt_ids("adapter", [case(rendered_ids=(1, 5))], prompts((1, 2)), prompts((1, 2)), (ENCODER, ENCODER))
    assert not check.passed


def test_chat_that_every_stage_refuses_is_the_same() -> None:
    assert check_prompt_ids("m", [case()], prompts(refusal="a"), prompts(refusal="b"), (ENCODER, ENCODER)).passed


def test_asks_force_each_answer_once() -> None:
    own = Scored(name="x", prompt_ids=(1,))
    both = case(expected_ids=(10, STOP), greedy_ids=(10,), has_ended=True)
    assert [ask.source for ask in asks(both, own, STOP)] == ["expected"]
    other = both.model_copy(update={"has_ended": False})
    assert asks(other, own, STOP) == [
        Ask(name="x", source="expected", prompt_ids=(1,), answer_ids=(10, STOP)),
        Ask(name="x", source="greedy", prompt_ids=(1,), answer_ids=(10,)),
    ]
    assert asks(both, Scored(name="x", refusal="no"), STOP) == []


def test_client_sends_arguments_of_a_call_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    sent = client_message({"role": "assistant", "content": "", "tool_calls": [call]})
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "ü"}'}
    assert client_message({"role": "user", "content": "x"}) == {"role": "user", "content": "x"}
