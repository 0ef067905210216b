"""Who may do what: ServiceAccounts by Roles and RoleBindings, asked of the loopback server or of the cluster that KUBECONFIG names."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipelines.cluster.apply import apply
from pipelines.cluster.refs import Ref
from tests.cluster.accounts import binding, connect_as, role
from tests.cluster.conftest import Api
from tests.cluster.samples import config_map, widget

READ = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
CAUGHT_UP_S = 10.0


class Worker:
    """A ServiceAccount, and what it is told."""

    def __init__(self, api: Api, name: str) -> None:
        self.admin, self.name = api, name
        self.asking = replace(api, cluster=connect_as(api.cluster, name))

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.admin.namespace}:{self.name}"

    def cannot(self, verb: str, resource: str, group: str = "") -> str:
        return f'User "{self.user}" cannot {verb} resource "{resource}" in API group "{group}" in the namespace "{self.admin.namespace}"'


def there(api: Api, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object that is there, by default a ConfigMap."""
    manifest = manifest or config_map()
    assert api.create(manifest).status == 201
    return manifest


@pytest.fixture
def worker(api: Api) -> Callable[..., Worker]:
    """Makes an account with a Role of these rules, and waits until that counts: a real server reads Roles a moment later."""

    def make(*rules: dict[str, Any]) -> Worker:
        name = f"worker-{secrets.token_hex(4)}"
        apply(api.cluster, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        seen = {"apiGroups": [""], "resources": ["limitranges"], "verbs": ["get"]}
        apply(api.cluster, role(name, *rules, seen))
        apply(api.cluster, binding(name, name))
        made = Worker(api, name)
        deadline_s = time.monotonic() + CAUGHT_UP_S
        path = f"/api/v1/namespaces/{api.namespace}/limitranges/none"
        while made.asking.cluster.request("GET", path, "look", expected=(403, 404)).status == 403:
            assert time.monotonic() < deadline_s, "the Role does not count in time"
            time.sleep(0.1)
        return made

    return make


def test_account_without_a_rule_for_it_is_refused_in_the_servers_words(api: Api, worker: Callable[..., Worker]) -> None:
    who, made = worker(), there(api)
    refused = who.asking.call("GET", made)
    name = made["metadata"]["name"]
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert refused.message == f'configmaps "{name}" is forbidden: {who.cannot("get", "configmaps")}'
    assert (refused.body["details"]["name"], refused.body["details"]["kind"]) == (name, "configmaps")
    path = f"/api/v1/namespaces/{api.namespace}/configmaps"
    for query, verb in (({}, "list"), ({"watch": "true"}, "watch")):
        answer = who.asking.cluster.request("GET", path, "ask", query=query, expected=(403,))
        assert answer.message == f"configmaps is forbidden: {who.cannot(verb, 'configmaps')}"
    for method, verb in (("PUT", "update"), ("PATCH", "patch"), ("DELETE", "delete")):
        answer = who.asking.call(
            method, made, made, content_type="application/merge-patch+json" if method == "PATCH" else "application/json"
        )
        assert answer.message.endswith(who.cannot(verb, "configmaps"))
    assert who.asking.create(made).message == f"configmaps is forbidden: {who.cannot('create', 'configmaps')}"


def test_rule_grants_its_verbs_on_its_kind_and_in_its_namespace_alone(api: Api, worker: Callable[..., Worker]) -> None:
    who, made = worker(READ), there(api)
    assert who.asking.call("GET", made).status == 200
    assert who.asking.call("DELETE", made).status == 403
    assert who.asking.call("GET", Ref("v1", "Secret", "any")).status == 403
    elsewhere = who.asking.cluster.request("GET", "/api/v1/namespaces/kube-system/configmaps/any", "ask", expected=(403,))
    assert elsewhere.message.endswith('cannot get resource "configmaps" in API group "" in the namespace "kube-system"')
    everywhere = who.asking.cluster.request("GET", "/api/v1/configmaps", "ask", expected=(403,))
    assert everywhere.message.endswith('cannot list resource "configmaps" in API group "" at the cluster scope')


def test_rule_with_names_grants_these_objects_alone_by_path_and_by_selector(api: Api, worker: Callable[..., Worker]) -> None:
    one, other = there(api), there(api)
    name = one["metadata"]["name"]
    who = worker({**READ, "verbs": ["get", "list"], "resourceNames": [name]})
    assert who.asking.call("GET", one).status == 200
    assert who.asking.call("GET", other).status == 403
    path = f"/api/v1/namespaces/{api.namespace}/configmaps"

    def listed(query: dict[str, str]) -> int:
        return who.asking.cluster.request("GET", path, "ask", query=query, expected=(403,)).status

    assert listed({"fieldSelector": f"metadata.name={name}"}) == 200
    assert listed({"fieldSelector": f"metadata.name={other['metadata']['name']}"}) == 403
    assert listed({}) == 403


def test_status_is_a_resource_of_its_own(api: Api, worker: Callable[..., Worker]) -> None:
    made = there(api, widget())
    group, name = "test.slipway.dev", made["metadata"]["name"]
    of_widgets = {"apiGroups": [group], "resources": ["widgets"], "verbs": ["get", "patch"]}
    of_status = {"apiGroups": [group], "resources": ["widgets/status"], "verbs": ["patch"]}
    without, beside = worker(of_widgets), worker(of_status)
    assert without.asking.patch(made, {"spec": {"size": 3}}).status == 200
    refused = without.asking.patch(made, {"status": {"done": 1}}, below="/status")
    assert refused.message == f'widgets.{group} "{name}" is forbidden: {without.cannot("patch", "widgets/status", group)}'
    assert beside.asking.patch(made, {"status": {"done": 1}}, below="/status").status == 200
    assert beside.asking.patch(made, {"spec": {"size": 4}}).status == 403


def test_apply_of_what_is_not_there_needs_the_right_to_create_too(api: Api, worker: Callable[..., Worker]) -> None:
    made = there(api)
    who = worker({**READ, "verbs": ["patch"]})
    assert who.asking.apply(made, "bob", force="true").status == 200
    absent = {**made, "metadata": {"name": f"absent-{secrets.token_hex(4)}"}}
    refused = who.asking.apply(absent, "bob")
    assert refused.status == 403
    assert refused.message.startswith(f'configmaps "{absent["metadata"]["name"]}" is forbidden:')
    assert api.call("GET", absent).status == 404
    may = worker({**READ, "verbs": ["patch", "create"]})
    assert may.asking.apply(absent, "bob").status == 201


def test_every_account_may_look_at_what_the_server_has(api: Api, worker: Callable[..., Worker]) -> None:
    who = worker()
    assert who.asking.cluster.has_kind("test.slipway.dev/v1", "Widget")
    assert who.asking.cluster.request("GET", "/version", "ask").body["gitVersion"]
    assert who.asking.cluster.request("GET", "/metrics", "ask", expected=(403, 404)).status == 403


def test_role_that_is_bound_and_not_there_is_named(api: Api, worker: Callable[..., Worker]) -> None:
    who, made = worker(READ), there(api)
    gone = Ref("rbac.authorization.k8s.io/v1", "Role", who.name)
    api.cluster.delete(gone)
    deadline_s = time.monotonic() + CAUGHT_UP_S
    while (answer := who.asking.call("GET", made)).status == 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert answer.message.endswith(f': RBAC: role.rbac.authorization.k8s.io "{who.name}" not found')


def test_token_of_an_account_that_is_gone_is_not_accepted(api: Api, worker: Callable[..., Worker]) -> None:
    who, made = worker(READ), there(api)
    assert who.asking.call("GET", made).status == 200
    api.cluster.delete(Ref("v1", "ServiceAccount", who.name))
    deadline_s = time.monotonic() + 12 * CAUGHT_UP_S  # a real server remembers for a while that a token was good
    while (answer := who.asking.call("GET", made)).status == 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert answer.status == 401
