"""Answers in the wire form of the OpenAI API: one JSON body, or server-sent events.

The part of an event that never changes within an answer is rendered once; per event only the new text is encoded.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from serving.engines.base import FinishReason
from serving.service import ServedModel

Endpoint = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"
OBJECTS: dict[Endpoint, str] = {"chat": "chat.completion", "completion": "text_completion"}
CHUNK_OBJECTS: dict[Endpoint, str] = {"chat": "chat.completion.chunk", "completion": "text_completion"}
ID_PREFIXES: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    num_prompt: int
    num_generated: int

    @property
    def body(self) -> dict[str, int]:
        """The counts under the API's names."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
        }


class AnswerFormat:
    """Renders one answer of one endpoint."""

    def __init__(self, endpoint: Endpoint, model: ServedModel, includes_usage: bool) -> None:
        self._endpoint = endpoint
        self._includes_usage = includes_usage
        self._head = {
            "id": f"{ID_PREFIXES[endpoint]}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        head = json.dumps({**self._head, "object": CHUNK_OBJECTS[endpoint]}, separators=(",", ":"))
        self._start = f'data: {head[:-1]},"choices":[{{"index":0,"logprobs":null,'
        self._end = (',"usage":null' if includes_usage else "") + "}\n\n"
        self._is_first = True

    def body(self, text: str, finish_reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The whole answer as one JSON body."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._endpoint == "chat" else {"text": text}
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason, **content}
        return {**self._head, "object": OBJECTS[self._endpoint], "choices": [choice], "usage": usage.body}

    def event(self, text: str, finish_reason: FinishReason | None) -> bytes:
        """One event with new text, the finish reason in the last."""
        reason = f'"{finish_reason}"' if finish_reason else "null"
        return f'{self._start}{self._content(text)},"finish_reason":{reason}}}]{self._end}'.encode()

    def last_events(self, usage: Usage) -> bytes:
        """What follows the last text: the token counts where asked for, and the end mark."""
        if not self._includes_usage:
            return DONE
        counts = {**self._head, "object": CHUNK_OBJECTS[self._endpoint], "choices": [], "usage": usage.body}
        return b"data: " + json.dumps(counts, separators=(",", ":")).encode() + b"\n\n" + DONE

    def _content(self, text: str) -> str:
        if self._endpoint == "completion":
            return f'"text":{json.dumps(text)}'
        role = '"role":"assistant",' if self._is_first else ""
        self._is_first = False
        return f'"delta":{{{role}"content":{json.dumps(text)}}}'


def error_event(body: dict[str, Any]) -> bytes:
    """An error after the stream has begun, when no status can be sent any more."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
