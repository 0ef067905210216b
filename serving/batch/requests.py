"""What a row asks for: the same requests as over HTTP, checked by the same code.

- `{"messages": [...], ...}` or `{"prompt": ..., ...}`: the body of a chat or of a completion, with `custom_id` or `id` beside it.
- `{"custom_id", "method", "url", "body"}`: a line of OpenAI's batch format, whose answer has that format's `response` too.
- A request names the model, or an adapter beside it as `NAME` or `MODEL:NAME`; without a name it means the model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from serving.batch.reading import Row
from serving.errors import ApiError
from serving.openai_format import Endpoint
from serving.openai_messages import Schema
from serving.openai_schema import ChatRequest, CompletionRequest, check_request

ID_KEYS = ("custom_id", "id")


class BatchLine(Schema):
    """A line of OpenAI's batch format."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was found good, but for its prompt."""

    request: ChatRequest | CompletionRequest
    has_full_answer: bool
    """Whether the whole answer is wanted, as it would be sent over HTTP: in OpenAI's format, or where a text is not all of it."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it would be sent."""
        return "chat" if isinstance(self.request, ChatRequest) else "completion"


def row_id(row: Row) -> str | None:
    """What a row calls itself."""
    found = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
    return str(found) if isinstance(found, str | int) else None


def read_request(row: Row, model_name: str, ignored_fields: Collection[str]) -> Asked:
    """The request of a row. Raises ApiError where the server would, and where the row is of no known form."""
    body = {key: value for key, value in row.items() if key not in ignored_fields}
    is_line = "body" in body
    if is_line:
        line = check_request(BatchLine, body)
        body, is_chat = line.body, line.url == "/v1/chat/completions"
    else:
        body = {key: value for key, value in body.items() if key not in ID_KEYS}
        is_chat = "messages" in body
        if is_chat == ("prompt" in body):
            found = ", ".join(sorted(body)[:8]) or "none"
            raise ApiError(f"a row has messages, or a prompt, or custom_id, method, url and body; the fields found are: {found}.")
    named = {"model": model_name, **body}
    request = check_request(ChatRequest, named) if is_chat else check_request(CompletionRequest, named)
    return Asked(request, is_line or (request.n or 1) > 1 or request.num_logprobs is not None)
