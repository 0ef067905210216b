"""The list `managedFields` of an object: read, changed by a write, and written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.charts.structural import Schema
from tests.cluster import fields
from tests.cluster.faults import Fault
from tests.cluster.fields import ABSENT, Path
from tests.cluster.kinds import Kind


class Manager(NamedTuple):
    """Whose a set of fields is: the same name owns apart what it applied and what it wrote otherwise."""

    name: str
    operation: str
    subresource: str = ""

    def shown(self, kind: Kind) -> str:
        """As a conflict names it: one that did not apply has the version in which it wrote."""
        below = f' with subresource "{self.subresource}"' if self.subresource else ""
        return f'"{self.name}"{below}' + ("" if self.operation == "Apply" else f" using {kind.api_version}")


@dataclass
class Entry:
    """What a manager owns, and since when."""

    paths: set[Path]
    time: str


def read(live: dict[str, Any]) -> dict[Manager, Entry]:
    """The managers of an object."""
    return {
        Manager(entry["manager"], entry["operation"], entry.get("subresource", "")): Entry(fields.decode(entry["fieldsV1"]), entry["time"])
        for entry in live["metadata"].get("managedFields") or []
    }


def write(live: dict[str, Any], managers: dict[Manager, Entry], kind: Kind) -> None:
    """Puts the managers into the object; one that owns nothing any more is not named."""
    entries = []
    for manager, entry in managers.items():
        if not entry.paths:
            continue
        shown: dict[str, Any] = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": kind.api_version,
            "time": entry.time,
        }
        shown |= {"fieldsType": "FieldsV1", "fieldsV1": fields.encode(entry.paths)}
        entries.append(shown | ({"subresource": manager.subresource} if manager.subresource else {}))
    live["metadata"]["managedFields"] = entries


def applied(
    live: dict[str, Any], sent: dict[str, Any], kind: Kind, manager: Manager, force: bool, now: str
) -> tuple[dict[str, Any], dict[Manager, Entry]]:
    """The object after an apply, and its managers then. Raises Fault for a clash."""
    schema, managers = kind.schema, read(live)
    try:
        mine = fields.paths_of(sent, schema)
    except ValueError as error:
        raise _untyped(kind, sent, str(error)) from error
    result = fields.merged(live, sent, schema)
    before = managers.pop(manager, Entry(set(), now))
    others = {path for entry in managers.values() for path in entry.paths}
    fields.remove(result, schema, fields.with_parents(before.paths) - fields.with_parents(mine | others))
    clashes = {other: _changed(live, result, schema, entry.paths) for other, entry in managers.items()}
    if not force and any(clashes.values()):
        raise _clash(clashes, kind)
    for other, paths in clashes.items():
        managers[other].paths -= paths
    is_same = mine == before.paths
    managers[manager] = Entry(mine, before.time if is_same else now)
    return result, managers


def updated(live: dict[str, Any], result: dict[str, Any], kind: Kind, manager: Manager, now: str) -> dict[Manager, Entry]:
    """The managers after a write that is no apply; `live` has no more than its metadata where the object is new."""
    managers = read(live)
    paths = fields.paths_of(result, kind.schema)
    changed = {path for path in paths if fields.value_at(live, kind.schema, path) is ABSENT} | _changed(live, result, kind.schema, paths)
    for entry in managers.values():
        entry.paths -= changed
    _forget_removed(managers, result, kind.schema)
    if changed:
        own = managers.get(manager, Entry(set(), now)).paths
        managers[manager] = Entry(own | changed, now)
    return managers


def _changed(live: dict[str, Any], result: dict[str, Any], schema: Schema, paths: set[Path]) -> set[Path]:
    """Those of the paths that are still there with another value; what has parts is there or not, its parts have paths of their own."""
    found = set()
    for path in paths:
        new = fields.leaf_at(result, schema, path)
        if new is not ABSENT and path[-1].startswith("f:") and new != fields.value_at(live, schema, path):
            found.add(path)
    return found


def _forget_removed(managers: dict[Manager, Entry], result: dict[str, Any], schema: Schema) -> None:
    for entry in managers.values():
        entry.paths = {path for path in entry.paths if fields.value_at(result, schema, path) is not ABSENT}


def _clash(clashes: dict[Manager, set[Path]], kind: Kind) -> Fault:
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": f"conflict with {manager.shown(kind)}",
            "field": fields.shown(path),
        }
        for manager, paths in clashes.items()
        for path in sorted(paths)
    ]
    word = "conflict" if len(causes) == 1 else "conflicts"
    listed = "; ".join(f"{cause['message']}: {cause['field']}" for cause in causes)
    return Fault(409, "Conflict", f"Apply failed with {len(causes)} {word}: {listed}", {"causes": causes})


def _untyped(kind: Kind, sent: dict[str, Any], why: str) -> Fault:
    """A manifest that does not fit the schema, which a real server too answers as if it were at fault itself."""
    metadata = sent["metadata"]
    name = f"{metadata.get('namespace', '')}/{metadata['name']}; {kind.api_version}, Kind={kind.kind}"
    return Fault(500, "", f"failed to create typed patch object ({name}): {why}")


def refuse_unknown(kind: Kind, sent: dict[str, Any], unknown: list[str]) -> None:
    """Raises Fault for an apply with fields that the schema lacks."""
    if unknown:
        listed = "\n".join(f"  .{path}: field not declared in schema" for path in unknown)
        raise _untyped(kind, sent, f".{unknown[0]}: field not declared in schema" if len(unknown) == 1 else "errors:\n" + listed)
