"""What an API server promises to refuse: values, names of fields, changes of what may not change."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import Api
from tests.cluster.samples import config_map, deployment, job, widget


def test_unknown_field_is_refused_when_strict_and_pruned_otherwise(api: Api) -> None:
    strict = api.create(widget(sise=4), fieldValidation="Strict")
    assert strict.status == 400
    assert "spec.sise" in strict.message
    loose = api.create(widget(sise=4), fieldValidation="Ignore")
    assert loose.status == 201
    assert "sise" not in loose.body["spec"]


def test_unknown_field_of_a_built_in_kind_is_refused_when_strict(api: Api) -> None:
    answer = api.create(deployment(replica=2), fieldValidation="Strict")
    assert answer.status == 400
    assert "spec.replica" in answer.message


def test_custom_object_gets_the_defaults_of_its_schema(api: Api) -> None:
    spec = api.create(widget(ports=[{"number": 80}])).body["spec"]
    assert spec["mode"] == "lift"
    assert spec["ports"] == [{"number": 80, "protocol": "TCP"}]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"size": 101}, "spec.size"),
        ({"size": "3"}, "spec.size"),
        ({"mode": "sideways"}, "spec.mode"),
        ({"size": 5, "limit": 4}, "a widget is no larger than its limit"),
        ({"ports": [{"number": 1}, {"number": 1}]}, "spec.ports[1]"),
        ({"tags": ["a", "a"]}, "spec.tags[1]"),
    ],
)
def test_custom_object_with_a_bad_value_gives_422_with_the_path(api: Api, spec: dict[str, object], words: str) -> None:
    made = widget()
    made["spec"].update(spec)
    answer = api.create(made)
    assert answer.status == 422
    assert words in answer.message


def test_custom_object_without_a_required_field_gives_422(api: Api) -> None:
    made = widget()
    del made["spec"]["size"]
    answer = api.create(made)
    assert answer.status == 422
    assert "size" in answer.message


def test_rule_about_a_change_is_asked_on_updates(api: Api) -> None:
    made = widget(mode="lower")
    assert api.create(made).status == 201
    answer = api.patch(made, {"spec": {"mode": "lift"}})
    assert answer.status == 422
    assert "the mode of a widget stays" in answer.message


def test_deployment_whose_selector_does_not_match_its_template_gives_422(api: Api) -> None:
    answer = api.create(deployment(selector={"matchLabels": {"app": "other"}}))
    assert answer.status == 422
    assert "spec.template.metadata.labels" in answer.message


def test_fixed_fields_of_built_in_kinds_are_refused_on_update(api: Api) -> None:
    made, work = deployment(), job()
    api.create(made)
    api.create(work)
    assert api.patch(made, {"spec": {"selector": {"matchLabels": {"app": "other"}}}}).status == 422
    changed = api.patch(work, {"spec": {"template": {"spec": {"containers": [{"name": "app", "image": "registry.example/app:2"}]}}}})
    assert changed.status == 422
    assert "immutable" in changed.message


def test_immutable_config_map_takes_labels_and_no_data(api: Api) -> None:
    made = {**config_map(), "immutable": True}
    api.create(made)
    assert api.patch(made, {"metadata": {"labels": {"a": "b"}}}).status == 200
    assert api.patch(made, {"data": {"a": "2"}}).status == 422


def test_secret_text_is_stored_as_base64_and_what_is_none_is_refused(api: Api) -> None:
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": config_map()["metadata"]["name"]}, "stringData": {"key": "word"}}
    live = api.create(made).body
    assert (live["data"], live["type"]) == ({"key": "d29yZA=="}, "Opaque")
    bad = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bad-secret"}, "data": {"key": "no base64!"}}
    assert api.create(bad).status in (400, 422)


def test_objects_that_are_too_large_are_refused(api: Api) -> None:
    assert api.create(config_map({"a": "x" * ((1 << 20) + 1)})).status in (413, 422)
    assert api.create(config_map(annotations={"a": "x" * ((256 << 10) + 1)})).status == 422
