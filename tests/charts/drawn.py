"""Values of a chart drawn from its own schema: each is one that the schema takes, and no person would think of."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from pipelines.charts import CHARTS_DIR

Path = tuple[str, ...]
# Passed on to Kubernetes as they are; what is in them is the user's word with the API server.
PASSED_ON = {"affinity", "topologySpreadConstraints", "extraIngress", "egress", "global", "config", "volumes"}
RESOURCES = {"requests", "limits"}
TEXT_ALPHABET = st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C"])
MAX_NUMBER = 1 << 31


def leaves(chart: str) -> list[tuple[Path, Mapping[str, Any]]]:
    """Every value of a chart that holds no others by name, with its schema; `config` and what is passed on are left out."""
    schema = json.loads((CHARTS_DIR / chart / "values.schema.json").read_text(encoding="utf-8"))
    return list(_leaves(schema, schema["$defs"], ()))


def changes(chart: str, most: int = 6) -> st.SearchStrategy[dict[str, Any]]:
    """Values over a chart's own: a handful of its leaves, each with a value that its schema takes."""
    schema = json.loads((CHARTS_DIR / chart / "values.schema.json").read_text(encoding="utf-8"))
    found = leaves(chart)

    @st.composite
    def draw(pick: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for index in pick(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=most, unique=True)):
            path, leaf = found[index]
            put(values, path, pick(quantities() if path[-1] in RESOURCES else value_of(leaf, schema["$defs"])))
        return values

    return draw()


def quantities() -> st.SearchStrategy[dict[str, Any]]:
    """What a container asks for; the names of devices are a cluster's own."""
    amounts = st.one_of(st.integers(1, 64), st.sampled_from([0.5, 1.5, "500m", "0.25", "2Gi", "1e3", "3G", ".5"]))
    return st.dictionaries(st.sampled_from(["cpu", "memory", "ephemeral-storage"]), amounts)


def put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets one value, making the mappings on the way."""
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = copy.deepcopy(value)


def value_of(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """A value that the schema takes. Never null: to Helm that is no value at all."""
    schema = _resolved(schema, defs)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = [option for option in schema[key] if _resolved(option, defs).get("type") != "null"]
            return st.one_of([value_of(option, defs) for option in options])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return {
        "boolean": lambda: st.booleans(),
        "integer": lambda: st.integers(schema.get("minimum", 0), schema.get("maximum", MAX_NUMBER)),
        "number": lambda: st.floats(schema.get("minimum", 0), schema.get("maximum", 1e9), allow_nan=False),
        "string": lambda: _text(schema),
        "array": lambda: _list(schema, defs),
        "object": lambda: _mapping(schema, defs),
    }[schema["type"]]()


def _leaves(schema: Mapping[str, Any], defs: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    schema = _resolved(schema, defs)
    if "properties" not in schema:
        yield path, schema
        return
    for name, below in schema["properties"].items():
        if name not in PASSED_ON:
            yield from _leaves(below, defs, (*path, name))


def _resolved(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    return {**defs[schema["$ref"].rpartition("/")[2]], **{key: value for key, value in schema.items() if key != "$ref"}}


def _text(schema: Mapping[str, Any]) -> st.SearchStrategy[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength", 64)
    refused = schema.get("not", {}).get("const")
    if "pattern" in schema:
        drawn = st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True).map(lambda text: text.rstrip("\n"))
    else:
        drawn = st.text(TEXT_ALPHABET, min_size=least, max_size=min(most, 64))
    return drawn.filter(lambda text: least <= len(text) <= most and text != refused)


def _list(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if "prefixItems" in schema:
        return st.tuples(*(value_of(item, defs) for item in schema["prefixItems"])).map(list)
    least = schema.get("minItems", 0)
    return st.lists(value_of(schema.get("items", {"type": "string"}), defs), min_size=least, max_size=max(least, 3))


def _mapping(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" in schema:
        needed = {name: value_of(below, defs) for name, below in schema["properties"].items() if name in schema.get("required", ())}
        others = {name: value_of(below, defs) for name, below in schema["properties"].items() if name not in needed | {"affinity": 0}}
        return st.fixed_dictionaries(needed, optional=others)
    patterns = {key: below for key, below in schema.get("patternProperties", {}).items() if below is not False}
    keys, below = next(iter(patterns.items()), (r"[a-z][a-z0-9-]{0,20}", schema.get("additionalProperties")))
    if not isinstance(below, Mapping):
        below = {"type": "string"}
    return st.dictionaries(st.from_regex(re.compile(keys, re.ASCII), fullmatch=True).map(str.strip), value_of(below, defs), max_size=3)
