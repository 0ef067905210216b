"""What a server that really runs makes of the chats, asked over HTTP as any client asks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from infra.cases import Case, client_message
from infra.config import Config
from infra.errors import TransientError
from pipelines.serve import post

STREAMS = 4
"""Chats at once; more would be no faster on a laptop."""
CLIENT_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


class LiveAnswer(Config):
    """What the endpoint made of one case."""

    name: str
    prompt_ids: tuple[int, ...] = ()
    refusal: str = ""
    context_tokens: int = 0
    num_prompt: int = 0
    """Prompt tokens that the answer was charged."""
    tokens: tuple[str, ...] = ()
    """Each token of the answer, as `token_label` has it."""
    logprobs: tuple[float, ...] = ()
    has_ended: bool = False


def token_label(text: str, told: Sequence[int]) -> str:
    """A token's text, or its bytes where it is part of a character: the texts of all such tokens are alike."""
    return bytes(told).hex(" ") if "\ufffd" in text else text


def ask_all(url: str, model_name: str, cases: Sequence[tuple[Case, int]]) -> list[LiveAnswer]:
    """The endpoint's answers, in the order of the cases; each comes with the most tokens that its answer may have."""
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(partial(_ask, url, model_name), cases))


def _ask(url: str, model_name: str, asked: tuple[Case, int]) -> LiveAnswer:
    """Raises TransientError where the server fails, which a refused chat is not."""
    case, max_tokens = asked
    messages = [{key: value for key, value in client_message(each).items() if key in CLIENT_KEYS} for each in case.messages]
    chat: dict[str, Any] = {"model": model_name, "messages": messages, **({"tools": list(case.tools)} if case.tools else {})}
    sampling = {"temperature": 0, "max_tokens": max_tokens, "logprobs": True}
    try:
        told = post(url, "/tokenize", {**chat, "add_generation_prompt": True}, None)
        answer = post(url, "/v1/chat/completions", {**chat, **sampling}, None)
    except TransientError as error:
        if " answered 4" not in error.message:
            raise
        return LiveAnswer(name=case.name, refusal=error.message)
    choice = answer["choices"][0]
    tokens = (choice["logprobs"] or {"content": []})["content"]
    return LiveAnswer(
        name=case.name,
        prompt_ids=tuple(told["tokens"]),
        context_tokens=told["max_model_len"],
        num_prompt=answer["usage"]["prompt_tokens"],
        tokens=tuple(token_label(each["token"], each["bytes"]) for each in tokens),
        logprobs=tuple(each["logprob"] for each in tokens),
        has_ended=choice["finish_reason"] != "length",
    )
