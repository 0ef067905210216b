"""ServiceAccounts, what they may do, and connections of theirs: to the loopback server, or to a real one."""

from __future__ import annotations

import copy
from typing import Any

from kubernetes.client import ApiClient

from pipelines.charts import render
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref
from tests.charts.objects import only
from tests.charts.test_training_chart import PIPELINE

RELEASE, DRIVER = "nightly", "nightly-driver"
RBAC = "rbac.authorization.k8s.io/v1"
TOKEN_REQUEST = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}


def connect_as(cluster: Cluster, name: str) -> Cluster:
    """A connection of the ServiceAccount of that name in the namespace of `cluster`, whose own account must be allowed to make tokens."""
    path = f"{cluster.path_of(Ref('v1', 'ServiceAccount', name))}/token"
    token = cluster.request("POST", path, f"make a token of {name}", body=TOKEN_REQUEST).body["status"]["token"]
    configuration = copy.deepcopy(cluster.api.configuration)
    configuration.api_key = {"BearerToken": f"Bearer {token}"}
    configuration.refresh_api_key_hook = None
    configuration.cert_file = configuration.key_file = None
    return Cluster(ApiClient(configuration), cluster.namespace, cluster.patience_s)


def driver_objects() -> dict[str, dict[str, Any]]:
    """What helm/training makes for the account of the pipeline's driver, by kind: the account, its Role and its RoleBinding."""
    rendered = render("training", PIPELINE, name=RELEASE)
    return {kind: only(rendered, kind, "-driver") for kind in ("ServiceAccount", "Role", "RoleBinding")}


def role(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    """A Role with these rules."""
    return {"apiVersion": RBAC, "kind": "Role", "metadata": {"name": name}, "rules": list(rules)}


def binding(account: str, role_name: str) -> dict[str, Any]:
    """A RoleBinding of that account to that Role."""
    subject = {"kind": "ServiceAccount", "name": account}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role_name}
    return {"apiVersion": RBAC, "kind": "RoleBinding", "metadata": {"name": account}, "subjects": [subject], "roleRef": reference}
