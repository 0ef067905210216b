"""Laws that server-side apply keeps whatever is applied, on specs that hypothesis makes up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.cluster import fields, ownership
from tests.cluster.conftest import WIDGET_SCHEMA
from tests.cluster.faults import Fault
from tests.cluster.kinds import Kind, whole_schema
from tests.cluster.ownership import Manager

SCHEMA = whole_schema(WIDGET_SCHEMA)
WIDGET = Kind("test.slipway.dev", "v1", "Widget", "widgets", True, True, True, SCHEMA)
LAWS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
ALICE, BOB = Manager("alice", "Apply"), Manager("bob", "Apply")
NAMES = some.sampled_from(["a", "b", "c"])
PORTS = some.fixed_dictionaries({"number": some.integers(1, 3)}, optional={"name": NAMES, "protocol": some.sampled_from(["TCP", "UDP"])})
SPECS = some.fixed_dictionaries(
    {},
    optional={
        "size": some.integers(1, 5),
        "mode": some.sampled_from(["lift", "lower"]),
        "ports": some.lists(PORTS, max_size=3, unique_by=lambda port: (port["number"], port.get("protocol", "TCP"))),
        "tags": some.lists(NAMES, max_size=3, unique=True),
        "notes": some.lists(NAMES, max_size=3),
        "colours": some.dictionaries(NAMES, NAMES, max_size=3),
        "place": some.dictionaries(some.sampled_from(["row", "shelf"]), some.integers(1, 3), max_size=2),
    },
)


def body(spec: dict[str, Any]) -> dict[str, Any]:
    """A Widget as it is sent."""
    return {"metadata": {"name": "w"}, "spec": copy.deepcopy(spec)}


def apply(live: dict[str, Any], spec: dict[str, Any], manager: Manager, force: bool = True) -> dict[str, Any]:
    """The object after an apply, its managers in it."""
    result, managers = ownership.applied(live, body(spec), WIDGET, manager, force, "now")
    ownership.write(result, managers, WIDGET)
    return result


def start() -> dict[str, Any]:
    """An object of which nobody owns anything."""
    return {"metadata": {"name": "w"}}


def holds(live: dict[str, Any], spec: dict[str, Any]) -> bool:
    """Whether each value that was applied is in the object."""
    sent = body(spec)
    return all(
        fields.value_at(live, SCHEMA, path) == fields.value_at(sent, SCHEMA, path)
        for path in fields.paths_of(sent, SCHEMA)
        if path[-1].startswith("f:") and fields.leaf_at(sent, SCHEMA, path) is not fields.ABSENT
    )


def test_item_that_another_wrote_into_keeps_the_keys_that_name_it() -> None:
    live = apply(start(), {"ports": [{"number": 1, "name": "a"}]}, ALICE)
    written = copy.deepcopy(live)
    written["spec"]["ports"][0]["name"] = "b"
    ownership.write(written, ownership.updated(live, written, WIDGET, Manager("carol", "Update"), "now"), WIDGET)
    assert apply(written, {"size": 1}, ALICE)["spec"] == {"size": 1, "ports": [{"number": 1, "name": "b"}]}


def test_what_holds_nothing_any_more_goes_and_what_another_named_stays() -> None:
    live = apply(start(), {"colours": {"a": "b"}, "size": 1}, ALICE)
    assert apply(live, {"size": 1}, ALICE)["spec"] == {"size": 1}
    both = apply(live, {"colours": {}}, BOB)
    assert apply(both, {"size": 1}, ALICE)["spec"] == {"size": 1, "colours": {}}


@LAWS
@given(SPECS)
def test_owned_paths_survive_being_written_down(spec: dict[str, Any]) -> None:
    paths = fields.paths_of(body(spec), SCHEMA)
    assert fields.decode(fields.encode(paths)) == paths


@LAWS
@given(SPECS, SPECS)
def test_what_was_applied_last_is_in_the_object_and_once_more_changes_nothing(first: dict[str, Any], second: dict[str, Any]) -> None:
    live = apply(apply(start(), first, ALICE), second, BOB)
    assert holds(live, second)
    assert apply(live, second, BOB) == live


@LAWS
@given(SPECS, SPECS)
def test_manager_that_applies_nothing_any_more_leaves_only_what_the_other_applied(mine: dict[str, Any], other: dict[str, Any]) -> None:
    both = apply(apply(start(), other, BOB), mine, ALICE)
    left = apply(both, {}, ALICE)
    known = fields.with_parents(fields.paths_of(body(other), SCHEMA)) | {("f:spec",)}
    # An item that stays keeps its keys, also one that the other left to its default.
    unknown = {path for path in fields.paths_of(left, SCHEMA) - known if not (fields.is_key(path) and path[:-1] in known)}
    assert unknown == set()


@LAWS
@given(SPECS, SPECS)
def test_apply_without_force_clashes_or_takes_nothing_from_another(first: dict[str, Any], second: dict[str, Any]) -> None:
    live = apply(start(), first, ALICE)
    before = copy.deepcopy(live)
    if shared(first, second):
        with pytest.raises(Fault, match='conflict with "alice"'):
            apply(live, second, BOB, force=False)
        assert live == before
    else:
        after = apply(live, second, BOB, force=False)
        assert holds(after, first)
        assert ownership.read(after).get(ALICE) == ownership.read(before).get(ALICE)


def shared(first: dict[str, Any], second: dict[str, Any]) -> set[fields.Path]:
    """The paths that both name, with another value each."""
    one, two = body(first), body(second)
    both = fields.paths_of(one, SCHEMA) & fields.paths_of(two, SCHEMA)
    return {path for path in both if path[-1].startswith("f:") and fields.value_at(one, SCHEMA, path) != fields.value_at(two, SCHEMA, path)}
