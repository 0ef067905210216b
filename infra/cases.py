"""Chats on which the stages of a model are compared, and what each stage makes of them: files that both stacks read and write.

- A stage encodes the messages itself, with the tokenizer and template of its own folder.
- Every stage is then forced through the same answers, so that its log-probabilities can be compared token by token.
- Of each distribution only the reference's likeliest tokens are kept, and the mass of the others together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict

from infra.answers import read_lines
from infra.chat import ChatCodec
from infra.config import Config
from infra.errors import ConfigError

CASES_NAME = "cases.jsonl"
TOP_TOKENS = 20
"""Tokens of each distribution that are kept; at 9 of 10 places of the trained 135M model they had more than 0.9995 of the mass."""
LEAST_MASS = 1e-9

AnswerSource = Literal["expected", "greedy"]


class Case(Config):
    """One chat up to the answer."""

    name: str
    kind: Literal["heldout", "adversarial"]
    messages: tuple[dict[str, Any], ...]
    """As the chat template reads them."""
    tools: tuple[dict[str, Any], ...] = ()
    row: int | None = None
    """Index in heldout.jsonl."""
    rendered_ids: tuple[int, ...] | None = None
    """The prompt as training rendered it; absent for a chat that is not of the dataset."""
    expected_ids: tuple[int, ...] = ()
    """The row's own answer with its stop token."""
    greedy_ids: tuple[int, ...] | None = None
    """What the trained model answers, without a stop token; absent until it has been asked."""
    has_ended: bool = False
    """Whether that answer ended by a stop token."""


class Forced(Config):
    """What a stage thinks of an answer, each token after the true ones before it; A tokens."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # damaged weights give NaN, which JSON has no word for

    source: AnswerSource
    ids: tuple[int, ...]
    """(A) the answer, with its stop token where it has one."""
    logprobs: tuple[float, ...]
    """(A)"""
    best_ids: tuple[int, ...]
    """(A) this stage's own likeliest token at each place."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """(A, `TOP_TOKENS`) the reference's likeliest tokens, best first."""
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """(A, `TOP_TOKENS`) of those tokens, by this stage."""

    def gap(self, place: int, tokens: Collection[int]) -> float:
        """How far the likeliest of `tokens` lies below this stage's likeliest token at a place, in nats, at least.

        Of a token that is none of the reference's likeliest only the mass of all such tokens is known.
        """
        if self.best_ids[place] in tokens or not self.top_ids:
            return 0.0
        known = dict(zip(self.top_ids[place], self.top_logprobs[place], strict=True))
        rest = math.log(max(1 - math.fsum(map(math.exp, known.values())), LEAST_MASS))
        return max(max(known.values()) - max((known.get(token, rest) for token in tokens), default=rest), 0.0)


class Scored(Config):
    """What one stage makes of one case."""

    name: str
    prompt_ids: tuple[int, ...] = ()
    refusal: str = ""
    """Why its template or its model refuses the messages; empty where they take them."""
    forced: tuple[Forced, ...] = ()
    answer_ids: tuple[int, ...] | None = None
    """Its own greedy answer without a stop token, where it was asked for one."""
    has_ended: bool = False
    """Whether that ended by a stop token."""


class Ask(Config):
    """One answer that a stage is forced through."""

    name: str
    """Of the case."""
    source: AnswerSource
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...] = ()
    """The reference's likeliest tokens; empty for the reference itself, which finds them."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.prompt_ids, *self.answer_ids)


Line = TypeVar("Line", Case, Scored)


def write_lines(path: Path, items: Iterable[Config]) -> None:
    """Writes one JSON object a line; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(item.model_dump_json() + "\n" for item in items)


def read_cases(folder: Path) -> list[Case]:
    """The cases of a certificate."""
    return [Case.model_validate_json(line) for line in read_lines(folder / CASES_NAME)]


def read_scored(folder: Path, stage: str) -> dict[str, Scored]:
    """What a stage made of each case, by the case's name."""
    found = (Scored.model_validate_json(line) for line in read_lines(scored_file(folder, stage)))
    return {each.name: each for each in found}


def scored_file(folder: Path, stage: str) -> Path:
    """Where a stage's lines lie."""
    return folder / f"{stage}.jsonl"


def encode_case(codec: ChatCodec, case: Case, vocabulary_tokens: int) -> Scored:
    """The case's prompt by a stage's own codec, or why that or its model, which knows so many tokens, refuses it."""
    try:
        ids = codec.encode(case.messages, case.tools or None, add_generation_prompt=True)
    except ConfigError as error:
        return Scored(name=case.name, refusal=error.message)
    if ids and max(ids) >= vocabulary_tokens:
        return Scored(name=case.name, refusal=f"its tokenizer gives token {max(ids)}, and its model knows {vocabulary_tokens}")
    return Scored(name=case.name, prompt_ids=tuple(ids))


def asks(case: Case, scored: Scored, stop_id: int, reference: Scored | None = None) -> list[Ask]:
    """The answers to force a stage through: the row's own, and the trained model's where that is another."""
    if scored.refusal or not scored.prompt_ids:
        return []
    answers: dict[AnswerSource, tuple[int, ...]] = {"expected": case.expected_ids}
    if case.greedy_ids is not None:
        greedy = (*case.greedy_ids, *((stop_id,) if case.has_ended else ()))
        if greedy != case.expected_ids:
            answers["greedy"] = greedy
    tops = {each.source: each.top_ids for each in reference.forced} if reference else dict.fromkeys(answers, ())
    return [
        Ask(name=case.name, source=source, prompt_ids=scored.prompt_ids, answer_ids=ids, top_ids=tops[source])
        for source, ids in answers.items()
        if ids and source in tops
    ]


def client_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a client of the OpenAI API sends it: the arguments of a tool call as text."""
    calls = [_client_call(call) for call in message.get("tool_calls") or ()]
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, **({"tool_calls": calls} if calls else {})}


def _client_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    told = {"type": "function", "function": {"name": function["name"], "arguments": text}}
    return {**({"id": call["id"]} if "id" in call else {}), **told}
