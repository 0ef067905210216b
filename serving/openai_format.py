"""Answers in the wire form of the OpenAI API: one JSON body, or server-sent events.

The part of an event that never changes within an answer is rendered once; per event only what is new is encoded.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from serving.choice import LikelyToken, Piece
from serving.service import ServedModel

Endpoint = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"
OBJECTS: dict[Endpoint, str] = {"chat": "chat.completion", "completion": "text_completion"}
CHUNK_OBJECTS: dict[Endpoint, str] = {"chat": "chat.completion.chunk", "completion": "text_completion"}
ID_PREFIXES: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer, all its choices together."""

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
        self._start = f'data: {head[:-1]},"choices":[{{"index":'
        self._begun: set[int] = set()
        self._num_chars: defaultdict[int, int] = defaultdict(int)

    def body(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The whole answer as one JSON body."""
        by_index: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_index[piece.index].append(piece)
        choices = [self._choice(index, by_index[index]) for index in sorted(by_index)]
        return {**self._head, "object": OBJECTS[self._endpoint], "choices": choices, "usage": usage.body}

    def event(self, piece: Piece, usage: Usage | None = None) -> bytes:
        """One event with what is new, the finish reason in the last of a choice; with the token counts so far where given."""
        reason = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        logprobs = json.dumps(self._logprobs(piece.logprobs, piece.index)) if piece.logprobs else "null"
        content = self._content(piece)
        counts = f',"usage":{json.dumps(usage.body) if usage else "null"}' if self._includes_usage else ""
        return f'{self._start}{piece.index},"logprobs":{logprobs},{content},"finish_reason":{reason}}}]{counts}}}\n\n'.encode()

    def last_events(self, usage: Usage) -> bytes:
        """What follows the last text: the token counts where asked for, and the end mark."""
        if not self._includes_usage:
            return DONE
        counts = {**self._head, "object": CHUNK_OBJECTS[self._endpoint], "choices": [], "usage": usage.body}
        return b"data: " + json.dumps(counts, separators=(",", ":")).encode() + b"\n\n" + DONE

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        likely = [token for piece in pieces for token in piece.logprobs]
        logprobs = self._logprobs(likely, index) if likely else None
        ending = {"index": index, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}
        if self._endpoint == "completion":
            return {**ending, "text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = [call.body for piece in pieces for call in piece.calls]
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {**ending, "message": message}

    def _content(self, piece: Piece) -> str:
        if self._endpoint == "completion":
            return f'"text":{json.dumps(piece.text)}'
        role = "" if piece.index in self._begun else '"role":"assistant",'
        self._begun.add(piece.index)
        calls = [{"index": call.index, **call.body} for call in piece.calls]
        called = f',"tool_calls":{json.dumps(calls)}' if calls else ""
        return f'"delta":{{{role}"content":{json.dumps(piece.text)}{called}}}'

    def _logprobs(self, tokens: Sequence[LikelyToken], index: int) -> dict[str, Any]:
        if self._endpoint == "chat":
            shown = [{**_shown(token), "top_logprobs": [_shown(other) for other in token.top]} for token in tokens]
            return {"content": shown, "refusal": None}
        ends = list(accumulate((len(token.text) for token in tokens), initial=self._num_chars[index]))
        self._num_chars[index] = ends[-1]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{other.text: other.logprob for other in (*token.top, token)} for token in tokens],
            "text_offset": ends[:-1],
        }


def error_event(body: dict[str, Any]) -> bytes:
    """An error after the stream has begun, when no status can be sent any more."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _shown(token: LikelyToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}
