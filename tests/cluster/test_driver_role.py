"""The driver's Role in helm/training against what the executor asks of the API server."""

from __future__ import annotations

import re
from typing import Any

import pytest

from infra.errors import ConfigError
from pipelines.charts import render
from pipelines.cluster.client import Cluster
from tests.charts.objects import only
from tests.charts.test_training_chart import PIPELINE
from tests.cluster.kuberay import KubeRay
from tests.cluster.test_kubernetes_executor import Toy, _quick, cluster, kuberay, pytestmark, server, toy

__all__ = ["_quick", "cluster", "kuberay", "pytestmark", "server", "toy"]  # fixtures of that module
IN_NAMESPACE = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/v\d+/namespaces/[^/]+/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<part>[a-z]+))?$"
)
OF_EVERYONE = re.compile(r"^/(version|api|apis)(/[a-z0-9.]+)*$")  # discovery, which Kubernetes grants to every account
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
Right = tuple[str, str, str]


def rights_of_the_role() -> set[Right]:
    """API group, resource and verb of each right that the chart grants."""
    rules = only(render("training", PIPELINE, name="nightly"), "Role")["rules"]
    return {(group, kind, verb) for rule in rules for group in rule["apiGroups"] for kind in rule["resources"] for verb in rule["verbs"]}


def right_of(method: str, path: str, query: Any) -> Right | None:
    """What a request needs; None where everyone may."""
    found = IN_NAMESPACE.match(path)
    if found is None:
        assert OF_EVERYONE.match(path), f"{method} {path} is not in a namespace"
        return None
    kind = found["kind"] + (f"/{found['part']}" if found["part"] else "")
    many = "watch" if "watch" in dict(query) else "list"
    return found["group"] or "", kind, VERBS.get(method) or ("get" if found["name"] else many)


@pytest.mark.slow
def test_role_of_the_driver_grants_what_the_executor_asks_for_and_nothing_more(
    toy: Toy, kuberay: KubeRay, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails, and one that ends well: applied, followed, its log read, deleted."""
    asked: set[Right] = set()
    send = cluster.send

    def watched(method: str, path: str, query: Any, *rest: Any) -> Any:
        if (right := right_of(method, path, query)) is not None:
            asked.add(right)
        return send(method, path, query, *rest)

    monkeypatch.setattr(cluster, "send", watched)
    with pytest.raises(ConfigError):
        toy.run(fails_by="no such row")
    toy.run(text="well")
    granted = rights_of_the_role()
    assert ("ray.io", "rayjobs", "patch") in asked
    assert asked - granted == set()
    # Server-side apply of what is not there yet needs the right to create it beside that to patch.
    assert granted - asked == {("ray.io", "rayjobs", "create")}
