"""What clients may send, checked before anything runs; every refusal is an ApiError that names the field.

- A parameter that changes the answer and is not supported is refused, never silently dropped.
- A parameter that does not change the answer (`user`, `metadata`, ...) is accepted and ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import from_json

from infra.api_keys import PRIORITIES
from serving.engines.base import Grammar
from serving.errors import ApiError
from serving.openai_messages import Message, NamedTool, ResponseFormat, Schema, StreamOptions, StructuredOutputs, Tool
from serving.wanted_grammar import forced_tools, wanted_grammar

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
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

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class SamplingRequest(Schema):
    """The parameters that both endpoints share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    """An extension that vLLM has too."""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """An extension that vLLM has too: tokens less likely than this share of the likeliest are not sampled."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    """An extension that vLLM has too: above 1, tokens of prompt and answer become less likely."""
    structured_outputs: StructuredOutputs | None = None
    """An extension that vLLM has too: what the answer must be."""
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
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
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

    @property
    def tells_usage(self) -> bool:
        """Whether each chunk of a stream has the token counts so far."""
        return self.includes_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside the chosen one's log-probability; None for none at all."""
        return None

    @property
    def grammar(self) -> tuple[Grammar, str] | None:
        """What the answer must be, and the field that says so. Raises ApiError where that cannot be kept."""
        return wanted_grammar(None, self.structured_outputs, ())


class ChatRequest(SamplingRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """A forced call is one call; calls of the model's own are all told, unless this is false."""
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The number of new tokens asked for; the newer field wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template shows to the model."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    @property
    def tool_names(self) -> frozenset[str]:
        """The tools whose calls are looked for in the answer."""
        return frozenset(tool.function.name for tool in self.tools or () if self.tool_choice != "none")

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside the chosen one's log-probability; None for none at all."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs is given without logprobs=true. Remove it, or ask for logprobs.", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def grammar(self) -> tuple[Grammar, str] | None:
        """What the answer must be, and the field that says so. Raises ApiError where that cannot be kept."""
        return wanted_grammar(self.response_format, self.structured_outputs, forced_tools(self.tools, self.tool_choice))


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    """Answers that are made and thrown away are not offered; ask for `n`, and choose."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: None = None

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt; a batch of one text, which some clients send, counts as that text."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        return texts[0] if texts else [item for item in self.prompt if isinstance(item, int)]

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside the chosen one's log-probability; None for none at all."""
        return self.logprobs


class TokenizeRequest(Schema):
    """Body of `POST /tokenize`, in vLLM's shape: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    """The template writes every special token itself, so none is ever added; true is refused."""
    return_token_strs: bool | None = None

    @field_validator("add_special_tokens")
    @classmethod
    def _check_special(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("no special token is ever added here: templates write their own, prompts are read as they are")
        return value


class DetokenizeRequest(Schema):
    """Body of `POST /detokenize`, in vLLM's shape."""

    model: str | None = None
    tokens: list[int]


R = TypeVar("R", bound=Schema)


def parse_request(model: type[R], body: bytes) -> R:
    """The checked request in `body`. Raises ApiError 400 on anything else."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}. Send one JSON object.") from error
    if not isinstance(data, dict):
        raise ApiError(f"the body is a JSON {type(data).__name__}. Send one JSON object.")
    return check_request(model, data)


def check_request(model: type[R], data: Mapping[str, Any]) -> R:
    """The checked request in a JSON object. Raises ApiError 400; the first problem is the one reported."""
    known = {key: value for key, value in data.items() if key not in IGNORED_FIELDS}
    try:
        request = model.model_validate(known)
    except ValidationError as error:
        raise _first_problem(model, error) from error
    if isinstance(request, SamplingRequest) and request.stream_options is not None and not request.stream:
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
