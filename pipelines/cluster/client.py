"""Reads and writes objects of a cluster as plain mappings.

The official client does what is hard about a connection: kubeconfig, tokens that expire, credential plug-ins, certificates, proxies.
Paths and kinds are found here by discovery: its dynamic client keeps what it discovered in a file of a name known to all in the
machine's temporary folder, and believes it across clusters that answer at the same address.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import urllib3
from kubernetes.client import ApiClient, ApiException

from infra.errors import ConfigError, TransientError
from infra.patience import waits_s
from pipelines.cluster.refs import Ref, ref_of, selector
from pipelines.cluster.refusals import Answer, known_error

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
PAGE_ITEMS = 500
MAX_BODY_BYTES = 3 << 20
FIELD_MANAGER = "slipway"
OURS = {"fieldManager": FIELD_MANAGER}
Propagation = Literal["Background", "Foreground", "Orphan"]
Query = Mapping[str, str]


@dataclass(frozen=True)
class Resource:
    """Where a kind's objects are found."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool


@dataclass
class Cluster:
    """A connection to one API server. Not shared between threads that write; reading from several is fine."""

    api: ApiClient
    namespace: str = "default"
    """Where objects go that name no namespace."""
    patience_s: float = 120.0
    """How long an API server may be away before a request fails."""
    resources: dict[tuple[str, str], Resource] = field(default_factory=dict)

    def get(self, ref: Ref) -> dict[str, Any] | None:
        """The object, or None where there is none, nor such a kind."""
        if not self.has_kind(ref.api_version, ref.kind):
            return None
        answer = self.request("GET", self.path_of(ref), f"read {ref}", expected=(404,))
        return None if answer.status == 404 else answer.body

    def find(
        self, api_version: str, kind: str, labels: Mapping[str, str] | None = None, namespace: str | None = None
    ) -> list[dict[str, Any]]:
        """The objects of a kind in a namespace, those that have all the labels; none where the cluster has no such kind."""
        if not self.has_kind(api_version, kind):
            return []
        return self.find_at(self.path(api_version, kind, namespace), api_version, kind, selector_query(labels))[0]

    def find_at(self, path: str, api_version: str, kind: str, query: Query) -> tuple[list[dict[str, Any]], str]:
        """The objects under a path, page by page, and the resourceVersion of the list."""
        found: list[dict[str, Any]] = []
        page: dict[str, str] = {"limit": str(PAGE_ITEMS)}
        while True:
            answer = self.request("GET", path, f"list {kind}", query={**query, **page}, expected=(410,) if found else ())
            if answer.status == 410:  # the list grew too old between two pages: from the start, all at once
                found, page = [], {}
                continue
            found += [{"apiVersion": api_version, "kind": kind, **item} for item in answer.body.get("items") or []]
            metadata = answer.body.get("metadata") or {}
            if not metadata.get("continue"):
                return found, str(metadata.get("resourceVersion", ""))
            page = {"limit": str(PAGE_ITEMS), "continue": metadata["continue"]}

    def create(self, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """The object as made, or None where one of its name was there: perhaps from a try of ours whose answer was lost."""
        ref = ref_of(manifest)
        path = self.path(ref.api_version, ref.kind, ref.namespace)
        answer = self.request("POST", path, f"create {ref}", query=OURS, body=manifest, expected=(409,))
        return None if answer.status == 409 else answer.body

    def merge(self, ref: Ref, patch: Mapping[str, Any], subresource: str = "") -> dict[str, Any]:
        """The object with a merge patch on it: null deletes a key, a list replaces a list."""
        path = self.path_of(ref) + (f"/{subresource}" if subresource else "")
        kind = "application/merge-patch+json"
        return self.request("PATCH", path, f"change {ref}", query=OURS, body=patch, content_type=kind).body

    def delete(self, ref: Ref, propagation: Propagation = "Background") -> bool:
        """Whether there was an object to delete; it may stay for a while until its finalizers are done, see `wait_gone`."""
        if not self.has_kind(ref.api_version, ref.kind):
            return False
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        answer = self.request("DELETE", self.path_of(ref), f"delete {ref}", body=options, expected=(404,))
        return answer.status != 404

    def wait_gone(self, ref: Ref, timeout_s: float) -> None:
        """Returns when the object is gone. Raises TransientError after `timeout_s`, with the finalizers that hold it."""
        deadline_s = time.monotonic() + timeout_s
        for wait_s in waits_s():
            live = self.get(ref)
            if live is None:
                return
            if time.monotonic() > deadline_s:
                held = ", ".join(live["metadata"].get("finalizers") or []) or "nothing that it names"
                raise TransientError(f"{ref} is still there {timeout_s:.0f} s after its deletion, held by {held}. Look at its controller.")
            time.sleep(min(wait_s, 2.0))

    def path_of(self, ref: Ref) -> str:
        """The path of one object."""
        return f"{self.path(ref.api_version, ref.kind, ref.namespace)}/{ref.name}"

    def path(self, api_version: str, kind: str, namespace: str | None = None) -> str:
        """The path of a kind's objects in a namespace, the client's own where none is named."""
        resource = self.resource(api_version, kind)
        inside = f"/namespaces/{namespace or self.namespace}" if resource.namespaced else ""
        return f"{group_path(api_version)}{inside}/{resource.plural}"

    def has_kind(self, api_version: str, kind: str) -> bool:
        """Whether the cluster has a kind, so that objects of it can be there."""
        if (api_version, kind) not in self.resources:
            answer = self.request("GET", group_path(api_version), f"look up {api_version}", expected=(404,))
            for entry in answer.body.get("resources") or []:
                if "/" not in entry["name"]:
                    found = Resource(api_version, entry["kind"], entry["name"], bool(entry["namespaced"]))
                    self.resources[api_version, entry["kind"]] = found
        return (api_version, kind) in self.resources

    def resource(self, api_version: str, kind: str) -> Resource:
        """Where a kind is found. Raises ConfigError where the cluster does not have it."""
        if not self.has_kind(api_version, kind):
            raise ConfigError(f"this cluster has no {kind} of {api_version}. {_needed_for(api_version)}")
        return self.resources[api_version, kind]

    def request(
        self,
        method: str,
        path: str,
        purpose: str,
        *,
        query: Query | None = None,
        body: Any = None,
        content_type: str = "application/json",
        expected: Collection[int] = (),
    ) -> Answer:
        """The server's answer: a success, or one of the `expected` codes.

        Raises ConfigError or TransientError for any other, the latter after `patience_s` of trying again.
        """
        _require_size(body, purpose)
        deadline_s = time.monotonic() + self.patience_s
        for pause_s in waits_s():
            outcome = self._try(method, path, query or {}, body, content_type)
            if isinstance(outcome, Answer):
                if outcome.status < 400 or outcome.status in expected:
                    return outcome
                if not outcome.will_pass:
                    raise known_error(outcome, purpose)
                pause_s = outcome.retry_after_s or pause_s
            if time.monotonic() + pause_s > deadline_s:
                raise known_error(outcome, purpose) if isinstance(outcome, Answer) else self.away(outcome, purpose)
            time.sleep(pause_s)
        raise AssertionError("unreachable: there is always another wait")

    def _try(self, method: str, path: str, query: Query, body: Any, content_type: str) -> Answer | urllib3.exceptions.HTTPError:
        """One request: the answer, or why there is none."""
        try:
            response = self.send(method, path, query, body, content_type, REQUEST_TIMEOUT_S)
            return answer_of(response, response.data)
        except urllib3.exceptions.HTTPError as error:
            return error

    def send(self, method: str, path: str, query: Query, body: Any, content_type: str, read_timeout_s: float) -> urllib3.BaseHTTPResponse:
        """The response to one request, its body still to be read. Raises urllib3's HTTPError, and ConfigError for a certificate."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        request = self.api.param_serialize(
            method, path, query_params=list(query.items()), header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        try:
            raw = self.api.call_api(*request, _request_timeout=(CONNECT_TIMEOUT_S, read_timeout_s))
        except ApiException as error:  # the library raises this without an answer only where TLS fails
            if "certificate" not in str(error.reason).lower():
                raise urllib3.exceptions.SSLError(error.reason) from error
            raise ConfigError(
                f"{self.api.configuration.host}: {error.reason}. Look at the cluster's certificate in the kubeconfig."
            ) from error
        response: urllib3.BaseHTTPResponse = raw.response
        return response

    def away(self, error: Exception, purpose: str) -> TransientError:
        """The error for a server that does not answer."""
        host = self.api.configuration.host
        return TransientError(
            f"{purpose}: {host} did not answer for {self.patience_s:.0f} s ({error}). Look at the cluster, then run it again."
        )


def answer_of(response: urllib3.BaseHTTPResponse, content: bytes) -> Answer:
    """A response that was read, as an answer; one that is not JSON, of a proxy on the way, becomes the message."""
    try:
        body = json.loads(content or b"{}")
    except ValueError:
        body = {"message": content.decode("utf-8", errors="replace")[:500]}
    after = response.headers.get("Retry-After", "")
    return Answer(response.status, body if isinstance(body, dict) else {}, float(after) if after.isdigit() else None)


def group_path(api_version: str) -> str:
    """Where a group's kinds are: the core group, which has no name, lies apart."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def selector_query(labels: Mapping[str, str] | None) -> dict[str, str]:
    """The query for objects with all the labels."""
    return {"labelSelector": selector(labels)} if labels else {}


def _require_size(body: Any, purpose: str) -> None:
    """Raises ConfigError for a body that no server takes: it would cut the connection, as if it were away."""
    size_bytes = len(json.dumps(body))
    if size_bytes > MAX_BODY_BYTES:
        raise ConfigError(f"{purpose}: the object has {size_bytes} bytes; an API server takes {MAX_BODY_BYTES}. Make it smaller.")


def _needed_for(api_version: str) -> str:
    operators = {
        "ray.io": "Install the KubeRay operator (1.7 or newer): its chart brings the kinds of ray.io.",
        "monitoring.coreos.com": "Install the Prometheus operator, or turn off monitoring in the values.",
        "gateway.networking.k8s.io": "Install the Gateway API and a controller for it, or use an Ingress.",
    }
    return operators.get(api_version.partition("/")[0], "Install what brings it, or use a cluster of a version that has it.")
