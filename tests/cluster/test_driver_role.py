"""The driver's Role in helm/training is what the executor needs: with it a step is made, and each right that is taken out is missed."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import ConfigError
from pipelines.cluster.apply import apply
from pipelines.cluster.client import Cluster
from tests.cluster.accounts import DRIVER, connect_as, driver_objects
from tests.cluster.kuberay import KubeRay
from tests.cluster.test_kubernetes_executor import Toy, _quick, cluster, kuberay, pytestmark, server, toy

__all__ = ["_quick", "cluster", "kuberay", "pytestmark", "server", "toy"]  # fixtures of that module
Right = tuple[str, str, str]
BEFORE_IT_RUNS: tuple[Right, ...] = (
    ("ray.io", "rayjobs", "get"),
    ("ray.io", "rayjobs", "patch"),
    ("ray.io", "rayjobs", "create"),
    ("ray.io", "rayjobs", "list"),
    ("ray.io", "rayjobs", "watch"),
    ("", "pods", "list"),
)
AT_ITS_END: Right = ("ray.io", "rayjobs", "delete")
FOR_ITS_LOG: tuple[Right, ...] = (("", "pods", "get"), ("", "pods/log", "get"))


def rights_of(role: dict[str, Any]) -> set[Right]:
    """API group, resource and verb of each right that the Role grants."""
    rules = role["rules"]
    return {(group, kind, verb) for rule in rules for group in rule["apiGroups"] for kind in rule["resources"] for verb in rule["verbs"]}


def without(role: dict[str, Any], right: Right) -> dict[str, Any]:
    """The Role with one right less."""
    group, kind, verb = right
    rules = [
        {**rule, "verbs": [each for each in rule["verbs"] if (rule["apiGroups"], rule["resources"], each) != ([group], [kind], verb)]}
        for rule in role["rules"]
    ]
    return {**role, "rules": [rule for rule in rules if rule["verbs"]]}


@pytest.fixture
def driver(cluster: Cluster, toy: Toy) -> Any:
    """A toy step whose driver is the chart's account, once its Role is given."""

    def with_role(role: dict[str, Any]) -> Toy:
        for manifest in {**driver_objects(), "Role": role}.values():
            apply(cluster, manifest)
        toy.cluster = connect_as(cluster, DRIVER)
        return toy

    return with_role


def missing(right: Right) -> str:
    """How the server words it; of what an apply makes anew it names no verb."""
    group, kind, verb = right
    user = f"system:serviceaccount:default:{DRIVER}"
    said = f'User "{user}" cannot {verb} resource "{kind}" in API group "{group}" in the namespace "default"'
    return "is forbidden: . This account may not do that" if verb == "create" else said


def test_rights_of_the_driver_are_those_that_are_tried_here_and_no_others() -> None:
    assert rights_of(driver_objects()["Role"]) == {*BEFORE_IT_RUNS, AT_ITS_END, *FOR_ITS_LOG}


@pytest.mark.parametrize("right", BEFORE_IT_RUNS, ids=" ".join)
def test_driver_without_a_right_ends_with_an_error_that_says_so(driver: Any, right: Right) -> None:
    with pytest.raises(ConfigError) as raised:
        driver(without(driver_objects()["Role"], right)).run()
    assert missing(right) in raised.value.message
    assert "give it the role" in raised.value.message


@pytest.mark.slow
def test_driver_with_the_role_of_the_chart_makes_a_step_and_tells_why_one_failed(driver: Any, kuberay: KubeRay, cluster: Cluster) -> None:
    toy = driver(driver_objects()["Role"])
    with pytest.raises(ConfigError, match="no such row"):
        toy.run(fails_by="no such row")
    toy.run(text="well")
    assert toy.text == "well"
    assert "toy step ends" in toy.log_file.read_text()
    assert "could not be read" not in toy.log_file.read_text()
    assert cluster.get(toy.ref) is None or cluster.get(toy.ref)["metadata"]["deletionTimestamp"]  # type: ignore[index]


@pytest.mark.slow
def test_driver_that_may_not_delete_ends_with_an_error_that_says_so(driver: Any, kuberay: KubeRay) -> None:
    with pytest.raises(ConfigError) as raised:
        driver(without(driver_objects()["Role"], AT_ITS_END)).run()
    assert missing(AT_ITS_END) in raised.value.message


@pytest.mark.slow
@pytest.mark.parametrize("right", FOR_ITS_LOG, ids=" ".join)
def test_driver_that_may_not_read_a_log_makes_the_step_and_says_in_the_log_why_it_is_none(
    driver: Any, kuberay: KubeRay, right: Right
) -> None:
    """A log must not end a run that goes well."""
    toy = driver(without(driver_objects()["Role"], right))
    toy.run(text="well")
    assert toy.text == "well"
    said = toy.log_file.read_text()
    assert "the log could not be read on" in said
    assert missing(right) in said
