"""The cluster that the contract is asked of: the loopback server, or with `SLIPWAY_TEST_CLUSTER=1` whatever `KUBECONFIG` names.

There it makes a namespace and the kind Widget, and takes both away; whoever runs it needs the right to do so. Nothing of it starts a pod.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.apply import apply
from pipelines.cluster.client import Cluster
from pipelines.cluster.connect import connect
from pipelines.cluster.refs import Ref, ref_of
from pipelines.cluster.refusals import Answer
from tests.charts.crds import crds_folder, read_crds
from tests.cluster.server import Server, serve

CLUSTER_VARIABLE = "SLIPWAY_TEST_CLUSTER"
ANY_REFUSAL = range(400, 600)
WIDGETS = "test.slipway.dev/v1"
PORT = {
    "type": "object",
    "required": ["number"],
    "properties": {"number": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}, "name": {"type": "string"}},
}
WIDGET_SPEC = {
    "type": "object",
    "required": ["size"],
    "x-kubernetes-validations": [
        {"rule": "!has(self.limit) || self.size <= self.limit", "message": "a widget is no larger than its limit"},
        {"rule": "self.mode == oldSelf.mode", "message": "the mode of a widget stays"},
    ],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 100},
        "limit": {"type": "integer"},
        "mode": {"type": "string", "enum": ["lift", "lower"], "default": "lift"},
        "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number", "protocol"], "items": PORT},
        "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "notes": {"type": "array", "items": {"type": "string"}},
        "colours": {"type": "object", "additionalProperties": {"type": "string"}},
        "place": {
            "type": "object",
            "x-kubernetes-map-type": "atomic",
            "properties": {"row": {"type": "integer"}, "shelf": {"type": "integer"}},
        },
    },
}
WIDGET_SCHEMA = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": WIDGET_SPEC,
        "status": {"type": "object", "properties": {"phase": {"type": "string"}, "done": {"type": "integer"}}},
    },
}
WIDGET_DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.test.slipway.dev"},
    "spec": {
        "group": "test.slipway.dev",
        "scope": "Namespaced",
        "names": {"kind": "Widget", "listKind": "WidgetList", "plural": "widgets", "singular": "widget"},
        "versions": [
            {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": WIDGET_SCHEMA}}
        ],
    },
}


@dataclass(frozen=True)
class Api:
    """A cluster, a namespace in it to work in, and requests as they go over the wire."""

    cluster: Cluster
    is_loopback: bool

    @property
    def namespace(self) -> str:
        """The namespace."""
        return self.cluster.namespace

    def call(
        self,
        method: str,
        manifest: Mapping[str, Any] | Ref,
        body: Any = None,
        *,
        below: str = "",
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        expected: Collection[int] = ANY_REFUSAL,
    ) -> Answer:
        """The answer to a request about an object; to POST, about its kind."""
        ref = manifest if isinstance(manifest, Ref) else ref_of(manifest)
        path = self.cluster.path(ref.api_version, ref.kind, ref.namespace)
        path += "" if method == "POST" else f"/{ref.name}{below}"
        return self.cluster.request(method, path, "ask", query=query, body=body, content_type=content_type, expected=expected)

    def create(self, manifest: Mapping[str, Any], **query: str) -> Answer:
        """The answer to a create."""
        return self.call("POST", manifest, manifest, query=query)

    def read(self, manifest: Mapping[str, Any] | Ref) -> dict[str, Any]:
        """The object, which is there."""
        answer = self.call("GET", manifest)
        assert answer.status == 200, answer
        return answer.body

    def apply(self, manifest: Mapping[str, Any], manager: str = "alice", below: str = "", **query: str) -> Answer:
        """The answer to a server-side apply by a manager."""
        asked = {"fieldManager": manager, **query}
        return self.call("PATCH", manifest, manifest, below=below, query=asked, content_type="application/apply-patch+yaml")

    def patch(self, manifest: Mapping[str, Any], patch: Any, kind: str = "merge", below: str = "", **query: str) -> Answer:
        """The answer to a patch of a kind: merge, json, strategic-merge."""
        return self.call("PATCH", manifest, patch, below=below, query=query, content_type=f"application/{kind}-patch+json")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The cluster of the contract, with a namespace of its own and the kind Widget."""
    if os.environ.get(CLUSTER_VARIABLE):
        with _prepared(connect(patience_s=0), is_loopback=False) as prepared:
            yield prepared
        return
    with serve() as server:
        if (kuberay := crds_folder()) is not None:
            server.install(read_crds(kuberay))
        cluster = connect(server.kubeconfig(tmp_path_factory.mktemp("cluster") / "kubeconfig"), patience_s=0)
        with _prepared(cluster, is_loopback=True) as prepared:
            yield prepared


@contextlib.contextmanager
def _prepared(cluster: Cluster, is_loopback: bool) -> Iterator[Api]:
    """Makes the namespace and the kind, and takes them away after the block."""
    cluster.namespace = f"slipway-test-{secrets.token_hex(4)}"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}}
    apply(cluster, namespace)
    apply(cluster, WIDGET_DEFINITION)
    deadline_s = time.monotonic() + 30
    while not cluster.has_kind(WIDGETS, "Widget"):
        assert time.monotonic() < deadline_s, "the kind Widget is not served in time"
        time.sleep(0.1)
    try:
        yield Api(cluster, is_loopback)
    finally:
        cluster.delete(ref_of(namespace))
        cluster.delete(ref_of(WIDGET_DEFINITION))


@pytest.fixture
def server() -> Iterator[Server]:
    """A loopback server of the test's own."""
    with serve() as running:
        yield running


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Cluster:
    """A client of the test's own server, which tries again for two seconds."""
    return connect(server.kubeconfig(tmp_path / "kubeconfig"), patience_s=2.0)
