"""What an API server promises of lists and watches, and of what goes with what. Asked of the loopback server, or of a real one."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pipelines.cluster.refs import Ref, ref_of
from pipelines.cluster.stream import lines_of
from tests.cluster.conftest import WIDGETS, Api
from tests.cluster.samples import config_map, name, widget


@pytest.fixture
def group() -> str:
    """A label value of the test's own."""
    return name()


def labelled(group: str, **metadata: Any) -> dict[str, Any]:
    """A ConfigMap of the test's own group."""
    return config_map(labels={"group": group}, **metadata)


def listed(api: Api, path: str, **query: str) -> dict[str, Any]:
    """The body of a list."""
    return api.cluster.request("GET", path, "list", query=query).body


def events(api: Api, path: str, number: int, **query: str) -> list[tuple[str, dict[str, Any]]]:
    """The next events of a watch, bookmarks left out: so many, and what comes soon after them."""
    full = {"watch": "true", "timeoutSeconds": "30", **query}
    response = api.cluster.send("GET", path, full, None, "application/json", 40.0)
    assert response.status == 200, response.data
    found: list[tuple[str, dict[str, Any]]] = []
    deadline_s = time.monotonic() + 20
    with lines_of(response, idle_s=0.15 if api.is_loopback else 2.0) as lines:
        for line in lines:
            event: dict[str, Any] = json.loads(line) if line else {"type": "BOOKMARK"}
            if event["type"] != "BOOKMARK":
                found.append((event["type"], event["object"]))
            if line is None and len(found) >= number:
                break
            assert time.monotonic() < deadline_s, f"only {found} came"
    return found


@pytest.fixture
def path(api: Api) -> str:
    """Where the ConfigMaps are."""
    return api.cluster.path("v1", "ConfigMap")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("tier=front", {"a", "b"}), ("tier!=front", {"c"}), ("tier in (back,middle)", {"c"}), ("side", {"b"}), ("!side", {"a", "c"}),
     ("tier=front,side=left", {"b"}), ("tier notin (back)", {"a", "b"})],
)  # fmt: skip
def test_list_by_labels_gives_those_that_match(api: Api, path: str, group: str, selector: str, expected: set[str]) -> None:
    for key, labels in {"a": {"tier": "front"}, "b": {"tier": "front", "side": "left"}, "c": {"tier": "back"}}.items():
        api.create({**config_map({"key": key}), "metadata": {"name": name(), "labels": {"group": group, **labels}}})
    found = listed(api, path, labelSelector=f"group={group},{selector}")
    assert {item["data"]["key"] for item in found["items"]} == expected


def test_list_by_a_bad_selector_gives_400(api: Api, path: str) -> None:
    assert api.cluster.request("GET", path, "list", query={"labelSelector": "a==b==c"}, expected=(400,)).status == 400


def test_list_by_name_gives_that_one(api: Api, path: str) -> None:
    made = config_map()
    api.create(made)
    found = listed(api, path, fieldSelector=f"metadata.name={made['metadata']['name']}")
    assert [item["metadata"]["name"] for item in found["items"]] == [made["metadata"]["name"]]


def test_list_in_pages_gives_each_object_once(api: Api, path: str, group: str) -> None:
    made = {api.create(labelled(group)).body["metadata"]["name"] for _ in range(5)}
    query = {"labelSelector": f"group={group}", "limit": "2"}
    pages = [listed(api, path, **query)]
    while token := pages[-1]["metadata"].get("continue"):
        pages.append(listed(api, path, **query, **{"continue": token}))
    names = [item["metadata"]["name"] for page in pages for item in page["items"]]
    assert [len(page["items"]) for page in pages] == [2, 2, 1]
    assert sorted(names) == sorted(made)


def test_list_of_a_kind_names_its_kind_and_version(api: Api) -> None:
    api.create(widget())
    found = listed(api, api.cluster.path(WIDGETS, "Widget"))
    assert (found["kind"], found["apiVersion"]) == ("WidgetList", WIDGETS)
    assert found["metadata"]["resourceVersion"]


def test_watch_from_a_list_tells_every_change_since_in_order(api: Api, path: str, group: str) -> None:
    start = listed(api, path)["metadata"]["resourceVersion"]
    made = labelled(group)
    api.create(made)
    api.patch(made, {"data": {"a": "2"}})
    api.patch(made, {"data": {"a": "3"}})
    api.call("DELETE", made)
    seen = events(api, path, 4, resourceVersion=start, labelSelector=f"group={group}")
    assert [(kind, live["data"]["a"]) for kind, live in seen] == [("ADDED", "1"), ("MODIFIED", "2"), ("MODIFIED", "3"), ("DELETED", "3")]
    versions = [int(live["metadata"]["resourceVersion"]) for _, live in seen]
    assert versions == sorted(set(versions))
    assert {live["kind"] for _, live in seen} == {"ConfigMap"}


def test_watch_from_a_later_version_tells_only_what_came_after(api: Api, path: str, group: str) -> None:
    made = labelled(group)
    api.create(made)
    middle = api.patch(made, {"data": {"a": "2"}}).body["metadata"]["resourceVersion"]
    api.patch(made, {"data": {"a": "3"}})
    seen = events(api, path, 1, resourceVersion=middle, labelSelector=f"group={group}")
    assert [(kind, live["data"]["a"]) for kind, live in seen] == [("MODIFIED", "3")]


def test_watch_without_a_version_begins_with_what_is_there(api: Api, path: str, group: str) -> None:
    made = {api.create(labelled(group)).body["metadata"]["name"] for _ in range(2)}
    seen = events(api, path, 2, labelSelector=f"group={group}")
    assert {(kind, live["metadata"]["name"]) for kind, live in seen} == {("ADDED", each) for each in made}


def test_object_that_comes_into_a_selector_is_added_and_one_that_leaves_it_deleted(api: Api, path: str, group: str) -> None:
    start = listed(api, path)["metadata"]["resourceVersion"]
    made = config_map(labels={"group": "none"})
    api.create(made)
    api.patch(made, {"metadata": {"labels": {"group": group}}})
    api.patch(made, {"metadata": {"labels": {"group": "none"}}})
    seen = events(api, path, 2, resourceVersion=start, labelSelector=f"group={group}")
    assert [kind for kind, _ in seen] == ["ADDED", "DELETED"]


def test_dry_runs_and_writes_of_the_same_are_no_events(api: Api, path: str, group: str) -> None:
    made = labelled(group)
    start = api.create(made).body["metadata"]["resourceVersion"]
    api.patch(made, {"data": {"a": "2"}}, dryRun="All")
    api.patch(made, {"data": {"a": "1"}})
    assert events(api, path, 0, resourceVersion=start, labelSelector=f"group={group}") == []


def test_list_and_watch_of_a_namespace_tell_nothing_of_another(api: Api, path: str, group: str) -> None:
    space: dict[str, Any] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{api.namespace}-beside"}}
    api.create(space)
    start = listed(api, path)["metadata"]["resourceVersion"]
    made = labelled(group, namespace=space["metadata"]["name"])
    api.create(made)
    api.create({**made, "metadata": {"name": made["metadata"]["name"], "labels": {"group": group}}, "data": {"a": "ours"}})
    query = {"labelSelector": f"group={group}"}
    assert [item["data"]["a"] for item in listed(api, path, **query)["items"]] == ["ours"]
    assert [live["data"]["a"] for _, live in events(api, path, 1, resourceVersion=start, **query)] == ["ours"]
    everywhere = listed(api, "/api/v1/configmaps", **query)["items"]
    assert {item["metadata"]["namespace"] for item in everywhere} == {api.namespace, space["metadata"]["name"]}
    api.cluster.delete(ref_of(space))


def test_watch_ends_after_the_seconds_that_were_asked_for(api: Api, path: str, group: str) -> None:
    began_s = time.monotonic()
    query = {"watch": "true", "timeoutSeconds": "1", "labelSelector": f"group={group}"}
    assert b"ADDED" not in api.cluster.send("GET", path, query, None, "application/json", 30.0).data
    assert time.monotonic() - began_s > 0.9


def test_owned_objects_go_with_their_owner(api: Api) -> None:
    owner = config_map()
    uid = api.create(owner).body["metadata"]["uid"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"], "uid": uid}
    owned, kept = config_map(ownerReferences=[reference]), config_map()
    api.create(owned)
    api.create(kept)
    api.cluster.delete(ref_of(owner))
    api.cluster.wait_gone(ref_of(owned), 60)
    assert api.call("GET", kept).status == 200


def test_orphaned_objects_stay_without_their_owner(api: Api) -> None:
    owner = config_map()
    uid = api.create(owner).body["metadata"]["uid"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"], "uid": uid}
    owned = config_map(ownerReferences=[reference])
    api.create(owned)
    api.cluster.delete(ref_of(owner), "Orphan")
    api.cluster.wait_gone(ref_of(owner), 60)
    assert not api.read(owned)["metadata"].get("ownerReferences")


def test_namespace_takes_all_that_lies_in_it(api: Api) -> None:
    space: dict[str, Any] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{api.namespace}-below"}}
    made = config_map(namespace=space["metadata"]["name"])
    api.create(space)
    api.create(made)
    api.cluster.delete(ref_of(space))
    api.cluster.wait_gone(ref_of(space), 120)
    assert api.call("GET", made).status == 404


def test_definition_shows_in_discovery_and_its_kinds_are_unknown_before(api: Api) -> None:
    groups = [each["name"] for each in listed(api, "/apis")["groups"]]
    assert "test.slipway.dev" in groups
    resources: list[dict[str, Any]] = listed(api, f"/apis/{WIDGETS}")["resources"]
    kinds = {entry["name"]: entry for entry in resources}
    assert (kinds["widgets"]["kind"], kinds["widgets"]["namespaced"]) == ("Widget", True)
    assert "widgets/status" in kinds
    assert api.cluster.request("GET", "/apis/absent.slipway.dev/v1", "look", expected=(404,)).status == 404
    assert not api.cluster.has_kind(WIDGETS, "Gadget")
    assert api.cluster.get(Ref(WIDGETS, "Gadget", "x")) is None
