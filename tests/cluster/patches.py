"""Patches that are no apply: merge patch, JSON patch, and the strategic one, which knows which lists are maps.

Source: RFC 7386, RFC 6902, and kubernetes/community, contributors/devel/sig-api-machinery/strategic-merge-patch.md.
"""

from __future__ import annotations

import copy
from typing import Any

from tests.charts.structural import Schema
from tests.cluster.faults import Fault, bad_request
from tests.cluster.fields import child_schema


def merge_patched(live: Any, patch: Any) -> Any:
    """A merge patch: null deletes a key, an object is merged, anything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(live) if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patched(result.get(key), value)
    return result


def strategic_patched(live: Any, patch: Any, schema: Schema) -> Any:
    """A merge patch that merges the lists for which the schema names a key, with `$patch: delete` and `$patch: replace`."""
    if isinstance(patch, list):
        return _strategic_list(live, patch, schema)
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    result = dict(live) if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif not key.startswith("$"):
            result[key] = strategic_patched(result.get(key), value, child_schema(schema, key))
    return result


def _strategic_list(live: Any, patch: list[Any], schema: Schema) -> list[Any]:
    if schema.get("x-kubernetes-patch-strategy") != "merge":
        return copy.deepcopy(patch)
    key, result = schema.get("x-kubernetes-patch-merge-key"), list(live or [])
    if key is None:
        return result + [item for item in patch if item not in result]
    for item in patch:
        same = next((index for index, old in enumerate(result) if old.get(key) == item.get(key)), None)
        if item.get("$patch") == "delete":
            result = [old for old in result if old.get(key) != item.get(key)]
        elif same is None:
            result.append(copy.deepcopy(item))
        else:
            result[same] = strategic_patched(result[same], item, schema.get("items", {}))
    return result


def json_patched(live: Any, operations: Any) -> Any:
    """A JSON patch. Raises Fault for one that does not fit the object."""
    if not isinstance(operations, list):
        raise bad_request("json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    result = copy.deepcopy(live)
    for operation in operations:
        try:
            result = _operate(result, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Fault(
                422, "Invalid", f"the server rejected our request due to an error in our request: {operation}: {error!r}"
            ) from error
    return result


def _operate(whole: Any, operation: dict[str, Any]) -> Any:
    path = _parts(operation["path"])
    name = operation["op"]
    if name in ("move", "copy"):
        value = copy.deepcopy(_at(whole, _parts(operation["from"])))
        if name == "move":
            _delete(whole, _parts(operation["from"]))
        return _add(whole, path, value)
    if name == "add":
        return _add(whole, path, operation["value"])
    found = _at(whole, path)
    if name == "test" and found != operation["value"]:
        raise ValueError("testing value failed")
    if name == "replace":
        _delete(whole, path)
        return _add(whole, path, operation["value"])
    if name == "remove":
        _delete(whole, path)
    return whole


def _parts(pointer: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _at(node: Any, path: list[str]) -> Any:
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _delete(whole: Any, path: list[str]) -> None:
    holder = _at(whole, path[:-1])
    del holder[int(path[-1]) if isinstance(holder, list) else path[-1]]


def _add(whole: Any, path: list[str], value: Any) -> Any:
    holder = _at(whole, path[:-1])
    if isinstance(holder, list):
        holder.insert(len(holder) if path[-1] == "-" else int(path[-1]), value)
    else:
        holder[path[-1]] = value
    return whole
