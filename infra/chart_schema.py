"""What a chart tells of its values, written from the pydantic model that is their only source: values.yaml, schema and table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
LINE_CHARS = 140
STEPS: dict[Any, str] = {list: "[].", tuple: "[].", dict: ".NAME."}
ABSENT, NEEDED = "absent", "needed"


@dataclass(frozen=True)
class Value:
    """One value of a chart, for its table."""

    path: str
    """`a.b` below a mapping, `a[].b` in a list, `a.NAME.b` in a mapping of free keys."""
    kind: str
    default: str
    text: str


def helm_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of a chart's values, for `values.schema.json`; Helm refuses by it, with the path, what the model would refuse."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": SCHEMA_DIALECT, **_closed(_without_absent_objects(_without_titles(schema)))}


def schema_text(model: type[BaseModel]) -> str:
    """`helm_schema` as the file holds it."""
    return json.dumps(helm_schema(model), indent=1, sort_keys=True) + "\n"


def values_text(model: type[BaseModel], intro: str) -> str:
    """`values.yaml`: every value with its default and its text; those that are absent by default are comments.

    A field marked `json_schema_extra={"chart": "absent"}` is one too: set and not set mean different things there, whatever its default.
    """
    return "\n".join([*(f"# {line}" for line in intro.splitlines()), *_yaml_lines(model(), 0)]) + "\n"


def values_table(model: type[BaseModel]) -> str:
    """A Markdown table of every value."""
    rows = [f"| `{value.path}` | {value.kind} | {value.default} | {value.text} |" for value in values_of(model, instance=model())]
    return "\n".join(["| value | kind | default | what it is |", "|---|---|---|---|", *rows]) + "\n"


def values_of(model: type[BaseModel], prefix: str = "", instance: BaseModel | None = None) -> Iterator[Value]:
    """Every value that holds no further ones of its own, in the order of the model's fields.

    Defaults are those of `instance` where there is one: a part of a chart may have others than its model.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        content = getattr(instance, name) if instance is not None else _default(field)
        if isinstance(content, dict) and content and all(isinstance(part, BaseModel) for part in content.values()):
            yield Value(path, _kind(field.annotation), ", ".join(f"`{key}`" for key in content), text)
            for key, part in content.items():
                yield from values_of(type(part), f"{path}.{key}.", part)
            continue
        if not isinstance(content, BaseModel):
            yield Value(path, _kind(field.annotation), ABSENT if _is_left_out(field) else _shown(content), text)
        seen: set[str] = set()
        for inner in _models_in(field.annotation):
            known = content if isinstance(content, inner) else None
            for value in values_of(inner, path + _step(field.annotation), known):
                if value.path not in seen:
                    seen.add(value.path)
                    yield value


def _closed(node: Any) -> Any:
    """The schema with mappings whose keys have a pattern closed to all other keys, as pydantic closes them but does not write."""
    if isinstance(node, dict):
        closed = {"additionalProperties": False} if "patternProperties" in node and "additionalProperties" not in node else {}
        return {key: _closed(value) for key, value in node.items()} | closed
    return [_closed(value) for value in node] if isinstance(node, list) else node


def _without_titles(node: Any, is_properties: bool = False) -> Any:
    """The schema without the titles that pydantic makes of the names; a property may be called `title`."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if is_properties or key != "title" or not isinstance(value, str)}
        return {key: _without_titles(value, key in ("properties", "$defs") and not is_properties) for key, value in kept.items()}
    return [_without_titles(value) for value in node] if isinstance(node, list) else node


def _without_absent_objects(node: Any) -> Any:
    """The schema without `null` beside an object: absent is how YAML says it, and a wrong key would be answered by two complaints."""
    if isinstance(node, dict):
        options = node.get("anyOf", ())
        if len(options) == 2 and "$ref" in options[0] and options[1] == {"type": "null"}:
            rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
            node = {**rest, **options[0]}
        return {key: _without_absent_objects(value) for key, value in node.items()}
    return [_without_absent_objects(value) for value in node] if isinstance(node, list) else node


def _yaml_lines(value: BaseModel, depth: int) -> Iterator[str]:
    """A model's fields as YAML, each under its text."""
    margin = "  " * depth
    for name, field in type(value).model_fields.items():
        key, content = field.alias or name, getattr(value, name)
        description = " ".join((field.description or _docstring(content)).split())
        width = LINE_CHARS - len(margin) - 2
        yield from (f"{margin}# {line}" for line in textwrap.wrap(description, width, break_long_words=False, break_on_hyphens=False))
        if isinstance(content, BaseModel):
            yield f"{margin}{key}:"
            yield from _yaml_lines(content, depth + 1)
        elif isinstance(content, dict) and content and all(isinstance(part, BaseModel) for part in content.values()):
            yield f"{margin}{key}:"
            for part_key, part in content.items():
                yield f"{margin}  {part_key}:"
                yield from _yaml_lines(part, depth + 2)
        elif content is None or _is_left_out(field):
            yield f"{margin}# {key}:"
        else:
            yield f"{margin}{key}: {_inline(value.model_dump(mode='json', include={name}, by_alias=True, exclude_none=True)[key])}"


def _is_left_out(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("chart") == ABSENT


def _docstring(value: Any) -> str:
    return (type(value).__doc__ or "") if isinstance(value, BaseModel) else ""


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").removesuffix("\n")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def _step(annotation: Any) -> str:
    """What stands between a value and those in it, also where it may be absent."""
    options = [annotation, *get_args(annotation)] if type(None) in get_args(annotation) else [annotation]
    options = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options]
    return next((STEPS[origin] for option in options if (origin := get_origin(option)) in STEPS), ".")


def _kind(annotation: Any) -> str:
    """What may be written there, in a word or two."""
    schema = TypeAdapter(annotation).json_schema(by_alias=True)
    return " or ".join(dict.fromkeys(_kinds(schema))).replace("|", "\\|") or "any"


def _kinds(schema: dict[str, Any]) -> Iterator[str]:
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key, ()):
            yield from _kinds(option)
    if "enum" in schema:
        yield from (f"`{value}`" for value in schema["enum"])
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif "$ref" in schema:
        yield "object"
    elif (kind := schema.get("type")) not in (None, "null"):
        yield {"array": "list"}.get(str(kind), str(kind))


def _default(field: FieldInfo) -> Any:
    """A field's default; PydanticUndefined where it has none."""
    return PydanticUndefined if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _shown(value: Any) -> str:
    if value is PydanticUndefined:
        return NEEDED
    if value is None:
        return ABSENT
    text = _inline(json.loads(json.dumps(value, default=lambda item: item.model_dump(mode="json", by_alias=True, exclude_none=True))))
    return f"`{text}`".replace("|", "\\|")
