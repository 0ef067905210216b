"""What a constrained answer may be asked to be: the subset of JSON Schema and of regular expressions that is really enforced.

- OpenVINO's grammar compiler raises inside the step that all requests share, and the pipeline never recovers: a bad grammar has to be found
  before it gets there. It also passes over keywords that it does not know, lets control characters into strings with a length, and numbers
  out of their bounds (seen with random schemas). So what is not in this subset is refused by name.
- The same subset holds for every engine.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from serving.engines.base import Grammar

MAX_SCHEMA_CHARS = 16_384
MAX_SCHEMA_DEPTH = 16
MAX_REGEX_CHARS = 512
MAX_REPEATS = 256  # of one quantifier, and of nested ones multiplied: compiling grows with it, and every request waits for that
REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
MUST_BE_ESCAPED = '"\\\x7f' + "".join(map(chr, range(32)))
PROPERTY_NAME = re.compile(r"[^\"\\\x00-\x1f\x7f]*")

JsonType = Literal["string", "number", "integer", "boolean", "null", "object", "array"]
Count = Annotated[int, Field(ge=0, le=MAX_REPEATS)]

_ESCAPED = r"\\(?:[dDwWsSnrtfv]|[.^$*+?()\[\]{}|/\\-])"
_REGEX_PARTS = re.compile(
    rf"(?P<class>\[\^?(?:{_ESCAPED}|[ -Z_-~])(?:{_ESCAPED}|[ -Z^-~])*\])|(?P<escape>{_ESCAPED})|(?P<open>\((?:\?:)?)|(?P<close>\))"
    r"|(?P<repeat>[*+?]|\{(?P<low>\d{1,4})(?P<comma>,)?(?P<high>\d{1,4})?\})|(?P<bar>\|)|(?P<char>[^\\\[\](){}*+?|^$])"
)


class JsonSchema(BaseModel):
    """A JSON schema in the enforced subset; other keywords are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    type: JsonType | Annotated[list[JsonType], Field(min_length=1)] | None = None
    properties: dict[str, JsonSchema] | None = None
    required: list[str] | None = None
    additional_properties: bool | None = Field(None, alias="additionalProperties")
    items: JsonSchema | None = None
    min_items: Count | None = Field(None, alias="minItems")
    max_items: Count | None = Field(None, alias="maxItems")
    pattern: str | None = None
    enum: Annotated[list[JsonValue], Field(min_length=1)] | None = None
    const: JsonValue = None
    any_of: Annotated[list[JsonSchema], Field(min_length=1)] | None = Field(None, alias="anyOf")
    ref: Annotated[str, Field(pattern=REFERENCE.pattern)] | None = Field(None, alias="$ref")
    defs: dict[str, JsonSchema] | None = Field(None, alias="$defs")
    definitions: dict[str, JsonSchema] | None = None
    title: str | None = None
    description: str | None = None
    default: JsonValue = None
    examples: list[JsonValue] | None = None
    dialect: str | None = Field(None, alias="$schema")

    @property
    def parts(self) -> list[JsonSchema]:
        """The schemas right inside this one, its definitions left out."""
        inside = [*(self.properties or {}).values(), *(self.any_of or ())]
        return [*inside, self.items] if self.items is not None else inside


def json_grammar(schema: Any) -> Grammar:
    """The grammar of `schema`. Raises ValueError, saying where, when it is not in the enforced subset."""
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"the JSON schema has {len(text)} characters; at most {MAX_SCHEMA_CHARS} are taken")
    try:
        root = JsonSchema.model_validate(schema)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"])) or "(top)"
        text = "this keyword is not enforced here" if problem["type"] == "extra_forbidden" else problem["msg"]
        raise ValueError(f"JSON schema at {place}: {text}") from error
    named = {**(root.definitions or {}), **(root.defs or {})}
    for top in (root, *named.values()):
        for part in _walk(top, 0 if top is root else 1):
            _check_part(part, named)
    _check_no_endless(named)
    return Grammar(kind="json_schema", text=text)


def regex_grammar(pattern: str) -> Grammar:
    """The grammar of a regular expression that the whole answer matches. Raises ValueError when it is not in the enforced subset."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern = pattern[:-1]
    if not 1 <= len(pattern) <= MAX_REGEX_CHARS:
        raise ValueError(f"the regular expression has {len(pattern)} characters; 1 to {MAX_REGEX_CHARS} are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of nested sets, which it reads as the grammar compiler does
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the regular expression is not valid: {error}") from error
    _check_repeats(pattern)
    return Grammar(kind="regex", text=pattern)


def _check_repeats(pattern: str) -> None:
    """Raises ValueError at the first construct outside the subset, or where nested repeats multiply beyond MAX_REPEATS."""
    place, before = 0, "bar"
    inside, last = [1], 1  # most copies of what stands in each open group, and of the part just read
    while place < len(pattern):
        part = _REGEX_PARTS.match(pattern, place)
        kind = part.lastgroup if part else None
        if part is None or (part["repeat"] and before in ("repeat", "open", "bar")) or (part["bar"] and before in ("open", "bar")):
            raise ValueError(f"the regular expression at character {place}: {pattern[place : place + 12]!r} is not supported here")
        if part["open"]:
            inside.append(1)
        elif part["close"]:
            if before in ("open", "bar"):
                raise ValueError(f"the regular expression at character {place}: an empty group or alternative is not supported here")
            last = inside.pop()
        elif part["repeat"]:
            last *= _most_copies(part)
        else:
            last = 1
        inside[-1] = max(inside[-1], last)
        if last > MAX_REPEATS:
            raise ValueError(f"the regular expression repeats a part {last} times; at most {MAX_REPEATS} are taken, nested ones multiplied")
        before = "repeat" if part["repeat"] else kind or ""
        place = part.end()
    if before == "bar":
        raise ValueError("the regular expression ends with an empty alternative, which is not supported here")


def _most_copies(part: re.Match[str]) -> int:
    """How many copies of its part a quantifier compiles to; `*` and `+` loop over one."""
    if part["low"] is None:
        return 1
    return max(1, int(part["low"]), int(part["high"] or 0))


def _check_string_pattern(pattern: str) -> None:
    """Raises ValueError where a pattern could write what would have to be escaped within a JSON string; the compiler would not."""
    for part in _REGEX_PARTS.finditer(pattern):
        if part.lastgroup in ("class", "escape", "char") and any(re.fullmatch(part[0], char) for char in MUST_BE_ESCAPED):
            raise ValueError(f"the JSON schema's pattern: {part[0]!r} could match a quote, a backslash or a control character")


def _walk(schema: JsonSchema, depth: int) -> Iterator[JsonSchema]:
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} deep")
    if depth and (schema.defs or schema.definitions):
        raise ValueError("the JSON schema has definitions inside a part; they are read at its top only")
    yield schema
    for part in schema.parts:
        yield from _walk(part, depth + 1)


def _check_part(schema: JsonSchema, named: dict[str, JsonSchema]) -> None:
    """Raises ValueError where keywords contradict each other, or name what is not there."""
    if schema.min_items is not None and schema.max_items is not None and schema.min_items > schema.max_items:
        raise ValueError(f"the JSON schema has minItems {schema.min_items} above maxItems {schema.max_items}")
    absent = set(schema.required or ()) - set(schema.properties or ())
    if absent:
        raise ValueError(f"the JSON schema requires {sorted(absent)}, which its properties lack")
    odd = [name for name in schema.properties or () if not PROPERTY_NAME.fullmatch(name)]
    if odd:
        raise ValueError(f"the JSON schema has the property {odd[0]!r}; names without quotes, backslashes and control characters are taken")
    if schema.items is None and (schema.min_items or schema.max_items):
        raise ValueError("the JSON schema has minItems or maxItems without items; say what the items are")
    if schema.ref is not None and schema.ref.rpartition("/")[2] not in named:
        raise ValueError(f"the JSON schema has no definition for {schema.ref!r}")
    if schema.pattern is not None:
        _check_string_pattern(regex_grammar(schema.pattern).text)


def _check_no_endless(named: dict[str, JsonSchema]) -> None:
    """Raises ValueError for a definition that leads to itself through references alone, so that no answer could ever begin."""
    waits = {name: _first_names(schema) for name, schema in named.items()}
    while waits:
        ready = [name for name, first in waits.items() if not first & set(waits)]
        if not ready:
            raise ValueError(f"the JSON schema's definitions {sorted(waits)} refer to each other and to nothing else")
        for name in ready:
            del waits[name]


def _first_names(schema: JsonSchema) -> set[str]:
    """The definitions that an answer of `schema` may be as a whole."""
    names = {schema.ref.rpartition("/")[2]} if schema.ref is not None else set[str]()
    return names.union(*(_first_names(part) for part in schema.any_of or ()))
