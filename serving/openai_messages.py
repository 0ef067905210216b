"""Messages, tools and formats as clients send them; the parts of the requests in `openai_schema.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

MAX_CHOICE_CHARS = 256

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Schema(BaseModel):
    """Base of request models: types are not converted, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True)


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


class Function(Schema):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")  # the template reads what else stands here

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, passed to the template as it is."""
    strict: bool | None = None


class Tool(Schema):
    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    name: str


class NamedTool(Schema):
    """The one tool that is to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class StreamOptions(Schema):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """An extension that vLLM has too, and load generators use: each chunk has the counts so far. Needs `include_usage`."""
    include_obfuscation: bool = False
    """Padding against traffic analysis; never added here."""


class JsonSchemaFormat(Schema):
    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    """The subset that is enforced stands in `serving/grammars.py`; anything else is refused."""
    strict: bool | None = None
    """Every schema is enforced, whatever this says."""


class TextFormat(Schema):
    type: Literal["text"]


class JsonObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Schema):
    """A JSON value of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Schema):
    """An extension that vLLM has too: what the answer must be; exactly one is given."""

    json_value: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]], Field(min_length=1, max_length=64)] | None = (
        None
    )
    """The answer is one of these texts."""
    json_object: bool | None = None


def _tool_call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = from_json(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments  # what the model wrote was not JSON; the template shows it as it was
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
