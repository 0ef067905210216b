"""What clients may send, checked before anything runs; every refusal is an ApiError that names the field.

- A parameter that changes the answer and is not supported is refused, never silently dropped.
- A parameter that does not change the answer (`user`, `metadata`, ...) is accepted and ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from infra.api_keys import PRIORITIES
from serving.errors import ApiError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
IGNORED_FIELDS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)

Role = Literal["system", "developer", "user", "assistant", "tool"]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Schema(BaseModel):
    """Base of request models: types are not converted, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TextPart(Schema):
    """One part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class FunctionCall(Schema):
    name: str
    arguments: str


class ToolCall(Schema):
    """A call that the assistant made earlier in the chat."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Schema):
    """One message of a chat."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: text joined, arguments as an object, `developer` under its older name."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [_tool_call_for_template(call) for call in self.tool_calls]
        return message


class Tool(Schema):
    type: Literal["function"]
    function: dict[str, Any]
    """Name, description and JSON schema, passed to the template as they are."""


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against traffic analysis; never added here."""


class ResponseFormat(Schema):
    type: Literal["text"]
    """Only plain text so far; a JSON schema is refused rather than ignored."""


class SamplingRequest(Schema):
    """The parameters that both endpoints share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    """An extension that vLLM has too."""
    ignore_eos: bool = False
    """An extension that vLLM has too: answer up to `max_tokens` whatever comes; load generators need it."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=PRIORITIES[0], le=PRIORITIES[1])] | None = None
    """An extension that vLLM has too: of the requests that wait, those with the smallest go first; 0 where absent."""
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(texts)} stop strings; at most {MAX_STOP_STRINGS} are taken")
        if any(not 1 <= len(text) <= MAX_STOP_CHARS for text in texts):
            raise ValueError(f"each stop string has 1 to {MAX_STOP_CHARS} characters")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """The number of new tokens asked for, if any."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(SamplingRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The number of new tokens asked for; the newer field wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template shows to the model."""
        return [tool.model_dump() for tool in self.tools] if self.tools and self.tool_choice != "none" else None


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt; a batch of one text, which some clients send, counts as that text."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        return texts[0] if texts else [item for item in self.prompt if isinstance(item, int)]


R = TypeVar("R", bound=SamplingRequest)


def parse_request(model: type[R], body: bytes) -> R:
    """The checked request in `body`. Raises ApiError 400 on anything else; the first problem is the one reported."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}. Send one JSON object.") from error
    if not isinstance(data, dict):
        raise ApiError(f"the body is a JSON {type(data).__name__}. Send one JSON object.")
    known = {key: value for key, value in data.items() if key not in IGNORED_FIELDS}
    try:
        request = model.model_validate(known)
    except ValidationError as error:
        raise _first_problem(model, error) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is given without stream=true. Remove it, or ask for a stream.", param="stream_options")
    return request


def _first_problem(model: type[BaseModel], error: ValidationError) -> ApiError:
    problem: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
    location: Sequence[Any] = problem["loc"]
    param = str(location[0])
    if problem["type"] == "extra_forbidden" and len(location) == 1:
        near = difflib.get_close_matches(param, model.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "it is not supported here; leave it out."
        return ApiError(f"unknown parameter {param!r}: {hint}", param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(f"{'.'.join(map(str, location))}: required, but absent.", param=param, code="missing_required_parameter")
    shown = repr(problem["input"])[:80]
    return ApiError(f"{'.'.join(map(str, location))}: {problem['msg']} (found {shown})", param=param, code="invalid_value")


def _tool_call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = from_json(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments  # what the model wrote was not JSON; the template shows it as it was
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
