"""What an API server promises of objects: codes, versions, what may be written. Asked of the loopback server, or of a real one."""

from __future__ import annotations

import pytest

from pipelines.cluster.refs import Ref, ref_of
from tests.cluster.conftest import Api
from tests.cluster.samples import config_map, deployment, named, pod, widget


def reasons(answer_body: dict[str, object]) -> tuple[object, object]:
    """The kind of an answer, and its reason."""
    return answer_body.get("kind"), answer_body.get("reason")


def test_create_of_a_new_name_gives_201_and_what_the_server_adds(api: Api) -> None:
    answer = api.create(config_map())
    metadata = answer.body["metadata"]
    assert answer.status == 201
    assert all(metadata[key] for key in ("uid", "resourceVersion", "creationTimestamp"))
    assert metadata["namespace"] == api.namespace


def test_create_of_a_taken_name_gives_409_already_exists(api: Api) -> None:
    made = config_map()
    api.create(made)
    again = api.create(made)
    assert again.status == 409
    assert reasons(again.body) == ("Status", "AlreadyExists")
    assert made["metadata"]["name"] in again.message


def test_create_by_generate_name_gives_a_name_with_that_beginning(api: Api) -> None:
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "auto-"}}
    answer = api.call("POST", Ref("v1", "ConfigMap", ""), made)
    assert answer.status == 201
    assert answer.body["metadata"]["name"].startswith("auto-")
    assert len(answer.body["metadata"]["name"]) > len("auto-")


def test_read_of_an_absent_object_gives_404_with_its_name(api: Api) -> None:
    answer = api.call("GET", Ref("v1", "ConfigMap", "absent"))
    assert answer.status == 404
    assert reasons(answer.body) == ("Status", "NotFound")
    assert answer.body["details"]["name"] == "absent"


def test_create_in_an_absent_namespace_gives_404_of_the_namespace(api: Api) -> None:
    answer = api.create(config_map(namespace="absent-namespace"))
    assert answer.status == 404
    assert "absent-namespace" in answer.message


def test_create_with_another_namespace_than_the_path_gives_400(api: Api) -> None:
    made = config_map(namespace="kube-system")
    answer = api.call("POST", Ref("v1", "ConfigMap", "x"), made)
    assert answer.status == 400


@pytest.mark.parametrize("name", ["Upper", "under_score", "-dash", "a" * 254])
def test_create_with_a_name_that_is_no_subdomain_gives_422_with_the_field(api: Api, name: str) -> None:
    made = config_map()
    made["metadata"]["name"] = name
    answer = api.create(made)
    assert answer.status == 422
    assert {cause["field"] for cause in answer.causes} == {"metadata.name"}


@pytest.mark.parametrize("labels", [{"a": "b c"}, {"a": "x" * 64}, {"a b": "c"}, {"a": "-b"}])
def test_create_with_a_bad_label_gives_422_with_the_field(api: Api, labels: dict[str, str]) -> None:
    answer = api.create(config_map(labels=labels))
    assert answer.status == 422
    assert all(cause["field"].startswith("metadata.labels") for cause in answer.causes)


def test_replace_with_an_old_version_gives_409_and_changes_nothing(api: Api) -> None:
    made = config_map()
    old = api.create(made).body
    api.patch(made, {"data": {"a": "2"}})
    answer = api.call("PUT", made, {**old, "data": {"a": "3"}})
    assert answer.status == 409
    assert reasons(answer.body) == ("Status", "Conflict")
    assert api.read(made)["data"] == {"a": "2"}


def test_replace_with_the_newest_version_gives_a_newer_one(api: Api) -> None:
    made = config_map()
    old = api.create(made).body
    new = api.call("PUT", made, {**old, "data": {"a": "3"}})
    assert new.status == 200
    assert new.body["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"]
    assert new.body["metadata"]["uid"] == old["metadata"]["uid"]


def test_replace_by_the_same_keeps_the_version(api: Api) -> None:
    made = config_map()
    old = api.create(made).body
    assert api.call("PUT", made, old).body["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"]


def test_replace_of_a_custom_object_without_a_version_gives_422(api: Api) -> None:
    made = widget()
    api.create(made)
    answer = api.call("PUT", made, made)
    assert answer.status == 422
    assert "resourceVersion" in answer.message


def test_replace_under_another_name_gives_400(api: Api) -> None:
    made = config_map()
    api.create(made)
    assert api.call("PUT", made, {**made, "metadata": {"name": "other"}}).status == 400


def test_generation_counts_changes_of_the_spec_alone(api: Api) -> None:
    made = widget()
    assert api.create(made).body["metadata"]["generation"] == 1
    assert api.patch(made, {"metadata": {"labels": {"a": "b"}}}).body["metadata"]["generation"] == 1
    assert api.patch(made, {"status": {"phase": "Going"}}, below="/status").body["metadata"]["generation"] == 1
    assert api.patch(made, {"spec": {"size": 4}}).body["metadata"]["generation"] == 2


def test_write_of_the_object_leaves_the_status_and_the_other_way_round(api: Api) -> None:
    made = widget()
    assert "status" not in api.create({**made, "status": {"phase": "Mine"}}).body
    api.patch(made, {"status": {"phase": "Going"}, "spec": {"size": 50}}, below="/status")
    live = api.read(made)
    assert (live["status"], live["spec"]["size"]) == ({"phase": "Going"}, 3)
    api.patch(made, {"status": {"phase": "Mine"}, "spec": {"size": 5}})
    live = api.read(made)
    assert (live["status"], live["spec"]["size"]) == ({"phase": "Going"}, 5)


@pytest.mark.parametrize("kind", ["create", "apply", "patch", "delete"])
def test_dry_run_answers_as_the_real_one_and_changes_nothing(api: Api, kind: str) -> None:
    made, new = config_map(), config_map()
    before = api.create(made).body
    query = {"dryRun": "All"}
    if kind == "create":
        assert api.create(new, **query).status == 201
    elif kind == "apply":
        assert api.apply(new, **query).status == 201
        assert api.apply(named(made, data={"b": "2"}), **query).body["data"] == {"a": "1", "b": "2"}
    elif kind == "patch":
        assert api.patch(made, {"data": {"a": "9"}}, **query).body["data"] == {"a": "9"}
    else:
        assert api.call("DELETE", made, query=query).status == 200
    assert api.call("GET", new).status == 404
    assert api.read(made) == before


def test_dry_run_of_what_is_refused_is_refused(api: Api) -> None:
    assert api.create(widget(size=101), dryRun="All").status == 422


def test_dry_run_of_an_unknown_kind_gives_an_error_and_creates_nothing(api: Api) -> None:
    made = config_map()
    assert api.create(made, dryRun="Some").status in (400, 422)
    assert api.call("GET", made).status == 404


def test_merge_patch_null_deletes_and_a_list_replaces(api: Api) -> None:
    made = widget(notes=["a", "b"], colours={"top": "red", "side": "blue"})
    api.create(made)
    spec = api.patch(made, {"spec": {"notes": ["c"], "colours": {"top": None}}}).body["spec"]
    assert (spec["notes"], spec["colours"]) == (["c"], {"side": "blue"})


def test_json_patch_changes_an_item_and_a_failed_test_changes_nothing(api: Api) -> None:
    made = widget(notes=["a", "b"])
    api.create(made)
    changed = api.patch(made, [{"op": "replace", "path": "/spec/notes/1", "value": "c"}], kind="json")
    assert changed.body["spec"]["notes"] == ["a", "c"]
    failed = api.patch(
        made, [{"op": "test", "path": "/spec/size", "value": 9}, {"op": "replace", "path": "/spec/size", "value": 8}], kind="json"
    )
    assert failed.status in (400, 422)
    assert api.read(made)["spec"]["size"] == 3


def test_strategic_patch_merges_containers_by_name_and_is_refused_for_custom_kinds(api: Api) -> None:
    made, other = deployment(), widget()
    api.create(made)
    api.create(other)
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "app", "image": "registry.example/app:2"}]}}}}
    (container,) = api.patch(made, patch, kind="strategic-merge").body["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["env"]) == ("registry.example/app:2", [{"name": "A", "value": "1"}])
    assert api.patch(other, {"spec": {"size": 4}}, kind="strategic-merge").status == 415


def test_delete_of_an_absent_object_gives_404(api: Api) -> None:
    assert api.call("DELETE", Ref("v1", "ConfigMap", "absent")).status == 404


def test_delete_with_another_uid_gives_409_and_the_object_stays(api: Api) -> None:
    made = config_map()
    api.create(made)
    options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    assert api.call("DELETE", made, options).status == 409
    assert api.call("GET", made).status == 200


def test_finalizer_holds_a_deleted_object_until_it_is_taken_off(api: Api) -> None:
    made = config_map(finalizers=["slipway.dev/test"])
    api.create(made)
    api.call("DELETE", made)
    live = api.read(made)
    assert live["metadata"]["deletionTimestamp"]
    api.patch(made, {"metadata": {"finalizers": None}})
    assert api.call("GET", made).status == 404


def test_request_without_the_right_token_gives_401(api: Api) -> None:
    if not api.is_loopback:
        pytest.skip("a real cluster may let anyone in that it does not know, or know its clients by certificate")
    token = api.cluster.api.configuration.api_key.pop("BearerToken")
    try:
        assert api.call("GET", Ref("v1", "ConfigMap", "x")).status == 401
    finally:
        api.cluster.api.configuration.api_key["BearerToken"] = token


def test_log_of_a_pod_that_has_not_started_gives_400(api: Api) -> None:
    made = pod("app", "side")
    api.create(made)
    path = api.cluster.path_of(ref_of(made)) + "/log"
    unnamed = api.cluster.request("GET", path, "read a log", expected=(400,))
    assert "a container name must be specified" in unnamed.message
    absent = api.cluster.request("GET", path, "read a log", query={"container": "none"}, expected=(400,))
    assert "container none is not valid" in absent.message
