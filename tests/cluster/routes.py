"""Which verb a request asks for, and its answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.cluster import discovery, rbac, selectors
from tests.cluster.faults import Fault, bad_request, gone, invalid, no_such_path
from tests.cluster.kinds import Kind
from tests.cluster.objects import Write, as_kind
from tests.cluster.paths import Asked, asked_for, name_of, verb_of
from tests.cluster.rbac import Account
from tests.cluster.store import Change, Name, Object

if TYPE_CHECKING:
    from tests.cluster.server import Server

APPLY = ("application/apply-patch+yaml", "application/apply-patch+json")
WAITING = ("ContainerCreating", "PodInitializing", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError")


@dataclass
class Request:
    """A request, as far as it was read."""

    method: str
    path: str
    query: dict[str, str]
    content_type: str = "application/json"
    user_agent: str = "unknown"
    body: Any = None
    account: Account | None = None
    """Who asks; None for the tests' own token, which may do everything."""

    def flag(self, name: str) -> bool:
        """Whether the query says so."""
        return self.query.get(name, "").lower() in ("true", "1")


@dataclass
class Reply:
    """An answer: a body, or a stream of chunks."""

    code: int
    body: Any = None
    stream: Iterator[bytes] | None = None
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a path names."""

    asked: Asked
    kind: Kind

    @property
    def namespace(self) -> str:
        """Empty where the kind has none, or all are meant."""
        return self.asked.namespace

    @property
    def name(self) -> str | None:
        """None where the kind itself is meant."""
        return self.asked.name or None

    @property
    def subresource(self) -> str:
        """Such as `status`; empty for the object itself."""
        return self.asked.subresource

    @property
    def object_name(self) -> Name:
        """The name of the object, with its namespace."""
        return self.namespace, self.name or ""


def answer(server: Server, request: Request) -> Reply:
    """The answer to a request. Raises Fault."""
    if any(request.path.startswith(f"/apis/{version}") for version in server.kinds_away):
        raise Fault(503, "ServiceUnavailable", "the server is currently unable to handle the request")
    found = discovery.answer(server.objects.kinds, request.path) if request.method == "GET" else None
    if found is not None:
        return Reply(200, found)
    asked = asked_for(request.path)
    if asked is None:
        rbac.require_path(request.account, request.path, request.method)
        raise no_such_path()
    verb, name = verb_of(request.method, asked, request.query), name_of(asked, request.query)
    rbac.require(server.objects.store, request.account, verb, asked, name)
    target = _target(server, asked)
    if target.subresource == "log" and target.kind.kind == "Pod" and request.method == "GET":
        return _pod_log(server, request, target)
    if target.subresource == "token" and target.kind.kind == "ServiceAccount" and request.method == "POST":
        return _token(server, target)
    if target.subresource and not (target.subresource == "status" and target.kind.has_status):
        raise no_such_path()
    verbs = {"GET": _read, "POST": _create, "PUT": _replace, "PATCH": _patch, "DELETE": _delete}
    return verbs[request.method](server, request, target)


def _target(server: Server, asked: Asked) -> Target:
    """What a path names. Raises Fault where that is nothing."""
    kind = server.objects.kinds.find(asked.group, asked.version, asked.plural)
    if kind is None or (kind.is_namespaced and not asked.namespace and asked.name) or (asked.namespace and not kind.is_namespaced):
        raise no_such_path()
    return Target(asked, kind)


def _how(request: Request, target: Target) -> Write:
    dry_run = request.query.get("dryRun")
    if dry_run not in (None, "All"):
        raise bad_request(f'Unsupported value: "{dry_run}": supported values: "All"')
    manager = request.query.get("fieldManager") or request.user_agent
    validation = request.query.get("fieldValidation") or "Warn"
    return Write(manager, dry_run == "All", request.flag("force"), validation, target.subresource)


def _read(server: Server, request: Request, target: Target) -> Reply:
    if target.name and not request.flag("watch"):
        return Reply(200, server.objects.get(target.kind, target.object_name))
    by_label = selectors.by_labels(request.query.get("labelSelector", ""))
    by_field = selectors.by_fields(request.query.get("fieldSelector", ""))

    def wanted(item: Object) -> bool:
        return by_label(item) and by_field(item) and target.name in (None, item["metadata"]["name"])

    if request.flag("watch"):
        return Reply(200, stream=_watch(server, request, target, wanted))
    return Reply(200, _list(server, request, target, wanted))


def _list(server: Server, request: Request, target: Target, wanted: Callable[[Object], bool]) -> Object:
    kind = target.kind
    items, version = server.objects.store.find((kind.group, kind.plural), target.namespace or None, wanted)
    start, at = 0, version
    if token := request.query.get("continue"):
        start, at = json.loads(token)
        if at < server.objects.store.oldest:
            raise Fault(410, "Expired", "The provided continue parameter is too old to display a consistent list result.")
    limit = int(request.query.get("limit") or 0) or len(items)
    metadata: dict[str, Any] = {"resourceVersion": str(at)}
    if start + limit < len(items):
        metadata |= {"continue": json.dumps([start + limit, at]), "remainingItemCount": len(items) - start - limit}
    shown = [{key: value for key, value in item.items() if key not in ("apiVersion", "kind")} for item in items[start : start + limit]]
    return {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": shown}


def _watch(server: Server, request: Request, target: Target, wanted: Callable[[Object], bool]) -> Iterator[bytes]:
    """Events from a version on: without one, from now, after one for each object that is there."""
    kind, store = target.kind, server.objects.store
    version = int(request.query.get("resourceVersion") or 0)
    deadline_s = time.monotonic() + float(request.query.get("timeoutSeconds") or 1800)
    if version == 0 or request.flag("sendInitialEvents"):
        items, version = store.find((kind.group, kind.plural), target.namespace or None, wanted)
        for item in items:
            yield _event("ADDED", as_kind(item, kind))
        if request.flag("sendInitialEvents"):
            yield _bookmark(kind, version, {"annotations": {"k8s.io/initial-events-end": "true"}})
    if version < store.oldest:
        yield _event("ERROR", gone().status())
        return
    while (left_s := deadline_s - time.monotonic()) > 0:
        found = store.changes_since(version, min(left_s, server.bookmark_s))
        if found is None:
            yield _event("ERROR", gone().status())
            return
        changes, version = found
        events = [event for change in changes if (event := _event_of(change, target, wanted))]
        yield from events
        if not changes and request.flag("allowWatchBookmarks"):
            yield _bookmark(kind, version, {})


def _bookmark(kind: Kind, version: int, more: Object) -> bytes:
    metadata = {"resourceVersion": str(version), "creationTimestamp": None, **more}
    return _event("BOOKMARK", {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata})


def _event_of(change: Change, target: Target, wanted: Callable[[Object], bool]) -> bytes | None:
    """What a change is to one who watches some objects: one that comes into sight is added, one that leaves it deleted."""
    kind = target.kind
    if change.kind != (kind.group, kind.plural) or target.namespace not in ("", change.name[0]):
        return None
    was, is_now = (item is not None and wanted(item) for item in (change.before, change.after))
    if not was and not is_now:
        return None
    name = "MODIFIED" if was and is_now else "ADDED" if is_now else "DELETED"
    return _event(name, as_kind(change.last, kind))


def _event(name: str, item: Object) -> bytes:
    return json.dumps({"type": name, "object": item}).encode() + b"\n"


def _create(server: Server, request: Request, target: Target) -> Reply:
    if target.name:
        raise Fault(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    return Reply(201, server.objects.create(target.kind, target.namespace, request.body, _how(request, target)))


def _replace(server: Server, request: Request, target: Target) -> Reply:
    return Reply(200, server.objects.replace(target.kind, target.object_name, request.body, _how(request, target)))


def _patch(server: Server, request: Request, target: Target) -> Reply:
    how = _how(request, target)
    if request.content_type not in APPLY:
        return Reply(200, server.objects.patch(target.kind, target.object_name, request.body, request.content_type, how))
    if "fieldManager" not in request.query:
        raise invalid("meta.k8s.io", "PatchOptions", "", [("fieldManager", "Required value: is required for apply patch")])
    if server.objects.store.get((target.kind.group, target.kind.plural), target.object_name) is None:
        rbac.require_create(server.objects.store, request.account, target.asked)
    item, is_new = server.objects.apply(target.kind, target.object_name, request.body, how)
    return Reply(201 if is_new else 200, item)


def _delete(server: Server, request: Request, target: Target) -> Reply:
    options = request.body if isinstance(request.body, dict) else {}
    options = {"propagationPolicy": request.query.get("propagationPolicy"), **options}
    is_dry = "dryRun" in request.query or bool(options.get("dryRun"))
    if target.name:
        return Reply(200, server.objects.delete(target.kind, target.object_name, options, is_dry))
    listed = _read(server, Request("GET", request.path, request.query), target).body
    for item in listed["items"]:
        name = (item["metadata"].get("namespace", ""), item["metadata"]["name"])
        server.objects.delete(target.kind, name, options, is_dry)
    return Reply(200, listed)


def _pod_log(server: Server, request: Request, target: Target) -> Reply:
    pod = server.objects.get(target.kind, target.object_name)
    container = request.query.get("container", "")
    _require_started(pod, container)
    since = request.query.get("sinceTime", "").removesuffix("Z")
    tail = int(request.query["tailLines"]) if "tailLines" in request.query else None
    num_stamp = 0 if request.flag("timestamps") else 1

    def shown(lines: list[tuple[str, str]]) -> bytes:
        return b"".join(" ".join(line[num_stamp:]).encode() + b"\n" for line in lines)

    if not request.flag("follow"):
        return Reply(200, shown(server.logs.read(*target.object_name, container, since, tail)), content_type="text/plain")

    def has_ended() -> bool:
        live = server.objects.store.get(("", "pods"), target.object_name)
        return live is None or (live.get("status") or {}).get("phase") in ("Succeeded", "Failed")

    lines = server.logs.follow(*target.object_name, container, since, has_ended)
    return Reply(200, stream=(shown(some) for some in lines), content_type="text/plain")


def _token(server: Server, target: Target) -> Reply:
    server.objects.get(target.kind, target.object_name)
    status = {"token": server.account_token(*target.object_name), "expirationTimestamp": "2099-01-01T00:00:00Z"}
    return Reply(201, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}, "status": status})


def _require_started(pod: Object, container: str) -> None:
    names = [entry["name"] for entry in pod["spec"].get("containers", []) + (pod["spec"].get("initContainers") or [])]
    name = pod["metadata"]["name"]
    if container and container not in names:
        raise bad_request(f"container {container} is not valid for pod {name}")
    if not container and len(pod["spec"]["containers"]) > 1:
        raise bad_request(f"a container name must be specified for pod {name}, choose one of: {names}")
    for entry in (pod.get("status") or {}).get("containerStatuses") or []:
        reason = (entry.get("state") or {}).get("waiting", {}).get("reason")
        if reason in WAITING and container in ("", entry["name"]):
            raise bad_request(f'container "{entry["name"]}" in pod "{name}" is waiting to start: {reason}')
