"""What an API server does to an object of a custom kind before it stores it: the schema's part of admission.

In this order: unknown fields are refused (or pruned), nulls are dropped, defaults are set, values are checked, lists that are maps or
sets are checked for twins, CEL rules are asked. The schema is a structural one: `openAPIV3Schema` of a CustomResourceDefinition.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import celpy
import jsonschema

Schema = Mapping[str, Any]
BITS = {"int32": 32, "int64": 64}
DATE_TIME = re.compile(r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(\.\d+)?(Z|[+-][0-2]\d:[0-5]\d)")


def unknown_fields(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Paths of the fields below `value` that `schema` does not name: strict validation refuses them, any other prunes them."""
    return [found for found, _, _ in _unknown(value, schema, path)]


def prune(value: Any, schema: Schema) -> None:
    """Takes out of `value` what `unknown_fields` would name."""
    for _, holder, key in list(_unknown(value, schema, "")):
        del holder[key]


def drop_nulls(value: Any, schema: Schema) -> None:
    """Takes out of `value` each null that its field does not allow and that no default replaces; nulls in lists stay."""
    for holder, key, below in _children(value, schema):
        if _is_refused_null(holder[key], below):
            if isinstance(holder, dict) and "default" not in below:
                del holder[key]
        else:
            drop_nulls(holder[key], below)


def set_defaults(value: Any, schema: Schema) -> None:
    """Sets the defaults of absent fields, and of those whose null their field does not allow, all the way down."""
    if isinstance(value, dict):
        for name, below in schema.get("properties", {}).items():
            if "default" in below and (name not in value or _is_refused_null(value[name], below)):
                value[name] = copy.deepcopy(below["default"])
    for holder, key, below in _children(value, schema):
        if _is_refused_null(holder[key], below) and "default" in below:
            holder[key] = copy.deepcopy(below["default"])
        set_defaults(holder[key], below)


def problems(value: Any, schema: Schema, old: Any = None) -> list[str]:
    """What is wrong with the values below `value`, a line each with its path; `old` is the stored object of an update."""
    found = [f"{_dotted(error.absolute_path)}: {error.message}" for error in _CHECKER(schema).iter_errors(value)]
    return found or list(_broken_rules(value, schema, old, ""))


def _unknown(value: Any, schema: Schema, path: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    if isinstance(value, dict) and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known = schema.get("properties", {})
        yield from ((_below(path, name), value, name) for name in value if name not in known)
    for holder, key, below in _children(value, schema):
        yield from _unknown(holder[key], below, _below(path, key))


def _children(value: Any, schema: Schema) -> list[tuple[Any, Any, Schema]]:
    """Each child that the schema describes: its holder, its key there and its schema."""
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [(value, index, schema["items"]) for index in range(len(value))]
    if not isinstance(value, dict):
        return []
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    below = {name: known.get(name, others) for name in value}
    return [(value, name, found) for name, found in below.items() if isinstance(found, Mapping)]


def _is_refused_null(value: Any, schema: Schema) -> bool:
    return value is None and not schema.get("nullable")


def _below(path: str, key: str | int) -> str:
    return f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")


def _dotted(keys: Any) -> str:
    return functools.reduce(_below, keys, "") or "(the object)"


def _check_type(_: Any, wanted: str, value: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
    if value is None and schema.get("nullable"):
        return
    if not jsonschema.Draft202012Validator({}).is_type(value, wanted):
        yield jsonschema.ValidationError(f"{wanted} is needed, found {_named(value)}")


def _check_format(_: Any, wanted: str, value: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
    bits = BITS.get(wanted)
    if bits and isinstance(value, int) and not -(1 << bits - 1) <= value < 1 << bits - 1:
        yield jsonschema.ValidationError(f"{value} does not fit {wanted}")
    if wanted == "date-time" and isinstance(value, str) and not DATE_TIME.fullmatch(value):
        yield jsonschema.ValidationError(f"{value!r} is no date-time")


def _check_list(_: Any, kind: str, value: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
    if not isinstance(value, list) or kind not in ("map", "set"):
        return
    seen: list[Any] = []
    for index, item in enumerate(value):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        identity = {key: item.get(key) for key in keys} if kind == "map" and isinstance(item, dict) else item
        if identity in seen:
            yield jsonschema.ValidationError(f"twice in a list of type {kind}: {identity}", path=[index])
        seen.append(identity)


def _named(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 80 else text[:77] + '...'}"


def _broken_rules(value: Any, schema: Schema, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        # A rule about the change of a value is asked only when there was one.
        if ("oldSelf" not in rule["rule"] or old is not None or rule.get("optionalOldSelf")) and not _holds(rule["rule"], value, old):
            yield f"{path or '(the object)'}: {rule.get('message') or 'failed rule: ' + rule['rule']}"
    for holder, key, below in _children(value, schema):
        yield from _broken_rules(holder[key], below, _before(old, key, holder, schema), _below(path, key))


def _before(old: Any, key: Any, holder: Any, schema: Schema) -> Any:
    """The old value that `holder[key]` replaces: by name in a map, by its keys in a list that is a map, nothing in any other list."""
    if isinstance(holder, dict):
        return old.get(key) if isinstance(old, dict) else None
    names = schema.get("x-kubernetes-list-map-keys")
    if not names or not isinstance(old, list):
        return None
    wanted = [holder[key].get(name) for name in names]
    return next((item for item in old if [item.get(name) for name in names] == wanted), None)


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = _environment()
    return environment.program(environment.compile(rule))


@functools.cache
def _environment() -> celpy.Environment:
    return celpy.Environment()


def _holds(rule: str, value: Any, old: Any) -> bool:
    """Whether a CEL rule holds; one that cannot be computed does not hold, as on a real server."""
    known = {"self": celpy.json_to_cel(value)} | ({} if old is None else {"oldSelf": celpy.json_to_cel(old)})
    try:
        return bool(_program(rule).evaluate(known))
    except celpy.CELEvalError:
        return False


_CHECKER = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"type": _check_type, "format": _check_format, "x-kubernetes-list-type": _check_list},
)
