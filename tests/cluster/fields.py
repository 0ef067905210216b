"""Who owns which field: server-side apply, and what other writes do to ownership.

- A manager owns a set of paths. A path is a tuple of elements as `fieldsV1` writes them: `f:name` a field, `k:{...}` an item of a list that
  is a map, `v:...` an item of a list that is a set.
- An apply sets what it names, removes what its manager applied before and names no longer unless another manager owns it, and clashes with
  managers that own what it would change.
- Any other write takes over what it changes, and everybody loses what is gone.
Source: sigs.k8s.io/structured-merge-diff; kubernetes.io/docs/reference/using-api/server-side-apply
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tests.charts.structural import Schema

Path = tuple[str, ...]
# Fields of the server itself, which nobody owns.
UNOWNED = {
    ("f:apiVersion",), ("f:kind",),
    *(("f:metadata", f"f:{name}") for name in (
        "name", "namespace", "uid", "creationTimestamp", "selfLink", "generation", "managedFields", "resourceVersion", "deletionTimestamp",
        "deletionGracePeriodSeconds",
    )),
}  # fmt: skip
# The one key of a built-in list that may be left out; the document that the schemas come from leaves its default out.
KEY_DEFAULTS = {"protocol": "TCP"}
ABSENT = object()


def list_type(schema: Schema) -> str:
    """`map`, `set` or `atomic`."""
    return str(schema.get("x-kubernetes-list-type", "atomic"))


def is_granular(schema: Schema) -> bool:
    """Whether the fields of an object have owners each, and not the object as a whole."""
    return schema.get("x-kubernetes-map-type") != "atomic"


def child_schema(schema: Schema, key: str) -> Schema:
    """The schema of a field."""
    found = schema.get("properties", {}).get(key)
    if found is None:
        found = schema.get("additionalProperties")
    return found if isinstance(found, Mapping) else {}


def element_of(item: Any, schema: Schema) -> str:
    """How an item of a list that is a map or a set is named. Raises ValueError for one that lacks its keys."""
    if list_type(schema) == "set":
        return "v:" + json.dumps(item, sort_keys=True, separators=(",", ":"))
    below = schema.get("items", {})
    names = {}
    for key in schema.get("x-kubernetes-list-map-keys", ()):
        default = child_schema(below, key).get("default", KEY_DEFAULTS.get(key))
        if item.get(key, default) is None:
            raise ValueError(
                f"associative list with keys has an element that omits key field {json.dumps(key)} (and doesn't have default value)"
            )
        names[key] = item.get(key, default)
    return "k:" + json.dumps(names, sort_keys=True, separators=(",", ":"))


def paths_of(value: Any, schema: Schema, at: Path = ()) -> set[Path]:
    """The paths that someone who sends `value` owns. Raises ValueError where a list has the same item twice."""
    if isinstance(value, dict) and is_granular(schema):
        return _paths_of_fields(value, schema, at) - UNOWNED
    if isinstance(value, list) and list_type(schema) in ("map", "set"):
        return _paths_of_items(value, schema, at)
    return {at}


def _paths_of_fields(value: dict[str, Any], schema: Schema, at: Path) -> set[Path]:
    found: set[Path] = set()
    for key, below in value.items():
        path = (*at, f"f:{key}")
        # An entry of a map, unlike a field that the schema names, is there or not by itself.
        if below in (None, {}) or key not in schema.get("properties", {}):
            found.add(path)
        if below != {}:
            found |= paths_of(below, child_schema(schema, key), path)
    return found


def _paths_of_items(value: list[Any], schema: Schema, at: Path) -> set[Path]:
    found: set[Path] = set()
    for item in value:
        path = (*at, element_of(item, schema))
        if path in found:
            raise ValueError(f"{shown(at)}: duplicate entries for key {shown(path[-1:])}")
        found.add(path)
        if list_type(schema) == "map":
            found |= paths_of(item, schema.get("items", {}), path)
    return found


def value_at(value: Any, schema: Schema, path: Path) -> Any:
    """What is at a path, or ABSENT."""
    return _found_at(value, schema, path)[0]


def leaf_at(value: Any, schema: Schema, path: Path) -> Any:
    """What is at a path, or ABSENT where that has parts with owners of their own."""
    found, below = _found_at(value, schema, path)
    has_parts = (isinstance(found, dict) and is_granular(below)) or (isinstance(found, list) and list_type(below) in ("map", "set"))
    return ABSENT if has_parts else found


def _found_at(value: Any, schema: Schema, path: Path) -> tuple[Any, Schema]:
    for element in path:
        value, schema = _step(value, schema, element)
        if value is ABSENT:
            break
    return value, schema


def _step(value: Any, schema: Schema, element: str) -> tuple[Any, Schema]:
    if element.startswith("f:"):
        key = element[2:]
        return (value[key], child_schema(schema, key)) if isinstance(value, dict) and key in value else (ABSENT, {})
    for item in value if isinstance(value, list) else ():
        if element_of(item, schema) == element:
            return item, schema.get("items", {})
    return ABSENT, {}


def merged(live: Any, sent: Any, schema: Schema) -> Any:
    """`live` with what was sent set in it, field by field and item by item."""
    if isinstance(sent, dict) and isinstance(live, dict) and is_granular(schema):
        return {**live, **{key: merged(live.get(key), value, child_schema(schema, key)) for key, value in sent.items()}}
    if isinstance(sent, list) and isinstance(live, list) and list_type(schema) in ("map", "set"):
        items = {element_of(item, schema): item for item in live}
        for item in sent:
            name = element_of(item, schema)
            items[name] = merged(items.get(name), item, schema.get("items", {}))
        return list(items.values())
    return copy.deepcopy(sent)


def remove(value: Any, schema: Schema, paths: set[Path]) -> None:
    """Takes the paths out of `value`."""
    for path in sorted(paths):
        if any(path[:length] in paths for length in range(1, len(path))):
            continue  # what it lies in goes as a whole
        holder, below = _found_at(value, schema, path[:-1])
        if isinstance(holder, dict) and not is_key(path):
            holder.pop(path[-1][2:], None)
        elif isinstance(holder, list):
            holder[:] = [item for item in holder if element_of(item, below) != path[-1]]


def is_key(path: Path) -> bool:
    """Whether a path is that by which its item is named, without which the item could not stay."""
    return len(path) > 1 and path[-2].startswith("k:") and path[-1][2:] in json.loads(path[-2][2:])


def with_parents(paths: Iterable[Path]) -> set[Path]:
    """The paths, and all that they lie in."""
    return {path[:length] for path in paths for length in range(1, len(path) + 1)}


def encode(paths: Iterable[Path]) -> dict[str, Any]:
    """A set of paths as `fieldsV1`."""
    found: dict[str, Any] = {}
    owned = set(paths)
    parents = {path[:length] for path in owned for length in range(1, len(path))}
    for path in sorted(owned):
        node = found
        for element in path:
            node = node.setdefault(element, {})
        if path in parents:
            node["."] = {}
    return found


def decode(fields: Mapping[str, Any], at: Path = ()) -> set[Path]:
    """The paths of a `fieldsV1`."""
    found = {at} if at and (not fields or "." in fields) else set()
    return found | {path for element, below in fields.items() if element != "." for path in decode(below, (*at, element))}


def shown(path: Path) -> str:
    """A path as messages have it: `.spec.containers[name="a"].image`."""
    text = ""
    for element in path:
        if element.startswith("f:"):
            text += f".{element[2:]}"
        elif element.startswith("v:"):
            text += f"[={element[2:]}]"
        else:
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(element[2:]).items()) + "]"
    return text
