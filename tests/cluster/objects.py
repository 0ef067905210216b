"""The verbs of an API server on its objects: create, replace, patch, apply, delete.

Every write goes one way: the new object is made from the old one and what was sent; unknown fields are refused, defaults set, values
checked; then it is stored under a new version, unless it is the same, or the write is a dry run.
"""

from __future__ import annotations

import copy
import datetime
import random
import string
import uuid
from dataclasses import dataclass
from typing import Any

from tests.charts.crds import admit
from tests.cluster import admission, deletion, ownership, patches
from tests.cluster.faults import Fault, already_exists, bad_request, conflict, invalid, not_found
from tests.cluster.kinds import Kind, Kinds
from tests.cluster.ownership import Manager
from tests.cluster.store import Name, Object, Store

# What a client sends of these in an object's metadata is overwritten.
SERVER_METADATA = ("uid", "creationTimestamp", "generation", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields")
# Built-in kinds whose generation counts the changes of what was asked for.
COUNTED = (
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "ReplicaSet",
    "Job",
    "CronJob",
    "Ingress",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "CustomResourceDefinition",
    "PriorityClass",
)
PATCHES = {
    "application/merge-patch+json": lambda live, patch, _: patches.merge_patched(live, patch),
    "application/json-patch+json": lambda live, patch, _: patches.json_patched(live, patch),
    "application/strategic-merge-patch+json": patches.strategic_patched,
}


@dataclass(frozen=True)
class Write:
    """How a write was asked for."""

    manager: str = "unknown"
    dry_run: bool = False
    force: bool = False
    validation: str = "Warn"
    """`Strict` refuses unknown fields, anything else prunes them."""
    subresource: str = ""


class Objects:
    """The objects of all kinds."""

    def __init__(self) -> None:
        self.kinds = Kinds()
        self.store = Store()
        for name in ("default", "kube-system"):
            self.create(self._kind("", "v1", "namespaces"), "", {"metadata": {"name": name}}, Write("apiserver"))

    def _kind(self, group: str, version: str, plural: str) -> Kind:
        found = self.kinds.find(group, version, plural)
        assert found is not None
        return found

    def get(self, kind: Kind, name: Name) -> Object:
        """The object. Raises Fault where there is none."""
        found = self.store.get((kind.group, kind.plural), name)
        if found is None:
            raise not_found(kind.group, kind.plural, name[1])
        return as_kind(found, kind)

    def create(self, kind: Kind, namespace: str, sent: Object, how: Write) -> Object:
        """A new object. Raises Fault where there is one of its name, and for what is wrong with it."""
        item = self._read(kind, namespace, sent)
        metadata = item["metadata"]
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
        if not metadata.get("name"):
            raise invalid(kind.group, kind.kind, "", [("metadata.name", "Required value: name or generateName is required")])
        with self.store.changed:
            self._require_namespace(namespace)
            if self.store.get((kind.group, kind.plural), (namespace, metadata["name"])) is not None:
                raise already_exists(kind.group, kind.plural, metadata["name"])
            if metadata.get("resourceVersion"):
                raise bad_request("resourceVersion should not be set on objects to be created")
            if kind.has_status:
                item.pop("status", None)
            return self._write(kind, None, item, how)

    def replace(self, kind: Kind, name: Name, sent: Object, how: Write) -> Object:
        """The object as sent. Raises Fault where it is not there, or was changed since the version that was sent."""
        item = self._read(kind, name[0], sent)
        _require_name(item, name[1])
        with self.store.changed:
            live = self.get(kind, name)
            if kind.is_custom and not item["metadata"].get("resourceVersion"):
                wrong = ("metadata.resourceVersion", "Invalid value: 0: must be specified for an update")
                raise invalid(kind.group, kind.kind, name[1], [wrong])
            return self._write(kind, live, self._kept(kind, live, item, how), how)

    def patch(self, kind: Kind, name: Name, patch: Any, content_type: str, how: Write) -> Object:
        """The object with a patch on it. Raises Fault for a kind of patch that is not known, or not for this kind."""
        change = PATCHES.get(content_type)
        if change is None or (kind.is_custom and "strategic" in content_type):
            raise Fault(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: "
                + ", ".join([name for name in PATCHES if not (kind.is_custom and "strategic" in name)] + ["application/apply-patch+yaml"]),
            )
        with self.store.changed:
            live = self.get(kind, name)
            item = change(live, patch, kind.schema)
            return self._write(kind, live, self._kept(kind, live, item, how), how)

    def apply(self, kind: Kind, name: Name, sent: Object, how: Write) -> tuple[Object, bool]:
        """The object after a server-side apply, and whether it is new. Raises Fault for a clash of owners."""
        item = self._read(kind, name[0], sent)
        item["metadata"].setdefault("name", name[1])
        _require_name(item, name[1])
        if item["metadata"].pop("managedFields", None):
            raise bad_request("metadata.managedFields must be nil")
        if (kind.has_status and not how.subresource) or how.subresource:
            item = {
                key: value
                for key, value in item.items()
                if (key == "status") == bool(how.subresource) or key in ("apiVersion", "kind", "metadata")
            }
        ownership.refuse_unknown(kind, item, admit(item, kind.as_custom()).unknown)
        with self.store.changed:
            self._require_namespace(name[0])
            live = self.store.get((kind.group, kind.plural), name)
            if live is None and (how.subresource or item["metadata"].get("uid")):
                raise not_found(kind.group, kind.plural, name[1])
            start = as_kind(
                live or {"metadata": {key: value for key, value in item["metadata"].items() if key in ("name", "namespace")}}, kind
            )
            manager = Manager(how.manager, "Apply", how.subresource)
            result, managers = ownership.applied(start, item, kind, manager, how.force, now())
            return self._write(kind, live and as_kind(live, kind), result, how, managers), live is None

    def delete(self, kind: Kind, name: Name, options: Object, dry_run: bool) -> Object:
        """The object as it is left, or as it was. Raises Fault where it is not there, or a precondition does not hold."""
        with self.store.changed:
            live = self.get(kind, name)
            for key, wanted in (options.get("preconditions") or {}).items():
                if live["metadata"].get(key) != wanted:
                    raise conflict(kind.group, kind.plural, name[1], f"the {key} in the precondition ({wanted}) is not that of the object")
            return live if dry_run else deletion.delete(self, kind, name, options.get("propagationPolicy") or "Background")

    def remove_finished(self, kind: Kind, name: Name) -> Object | None:
        """Takes out an object that is being deleted and that nothing holds any more."""
        found = self.store.drop((kind.group, kind.plural), name)
        if found is not None and kind.kind == "CustomResourceDefinition":
            self.kinds.withdraw(found)
        return found

    def _read(self, kind: Kind, namespace: str, sent: Any) -> Object:
        """A body as an object of this place. Raises Fault for one that is not."""
        if not isinstance(sent, dict) or not isinstance(sent.setdefault("metadata", {}), dict):
            raise bad_request(f"an object of kind {kind.kind} is needed")
        for key, wanted in (("apiVersion", kind.api_version), ("kind", kind.kind)):
            if sent.get(key, wanted) != wanted:
                raise bad_request(f"{key} in the data ({sent[key]}) does not match the expected {key} ({wanted})")
        place = sent["metadata"].get("namespace") or namespace
        if place != namespace and kind.is_namespaced:
            raise bad_request(
                f"the namespace of the provided object does not match the namespace sent on the request ({place}, {namespace})"
            )
        item = as_kind(copy.deepcopy(sent), kind)
        if kind.is_namespaced:
            item["metadata"]["namespace"] = namespace
        return item

    def _require_namespace(self, namespace: str) -> None:
        if not namespace:
            return
        live = self.store.get(("", "namespaces"), ("", namespace))
        if live is None:
            raise not_found("", "namespaces", namespace)
        if live["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise Fault(
                403, "Forbidden", why, {"causes": [{"reason": "NamespaceTerminating", "message": why, "field": "metadata.namespace"}]}
            )

    def _kept(self, kind: Kind, live: Object, item: Object, how: Write) -> Object:
        """What a write of the object, or of its status, may change: the rest stays as it is."""
        version = item["metadata"].get("resourceVersion")
        if version and version != live["metadata"]["resourceVersion"]:
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise conflict(kind.group, kind.plural, live["metadata"]["name"], why)
        if item["metadata"].get("uid", live["metadata"]["uid"]) != live["metadata"]["uid"]:
            raise conflict(kind.group, kind.plural, live["metadata"]["name"], "Precondition failed: UID in precondition does not match")
        if how.subresource == "status":
            return {**live, "status": item.get("status", {})}
        if kind.has_status:
            item = {key: value for key, value in item.items() if key != "status"} | ({"status": live["status"]} if "status" in live else {})
        return item

    def _write(
        self, kind: Kind, live: Object | None, item: Object, how: Write, managers: dict[Manager, ownership.Entry] | None = None
    ) -> Object:
        """Admits and stores an object; as it is stored."""
        name = (item["metadata"].get("namespace", "") if kind.is_namespaced else "", item["metadata"]["name"])
        item = self._admitted(kind, live, item, how)
        metadata = item["metadata"]
        before = live["metadata"] if live else {}
        for key in SERVER_METADATA:
            metadata.pop(key, None)
        metadata.update({key: before[key] for key in SERVER_METADATA if key in before})
        if live is None:
            metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now())
        if (kind.is_custom or kind.kind in COUNTED) and (live is None or _content(live) != _content(item)):
            metadata["generation"] = before.get("generation", 0) + 1
        start = live or {"metadata": {}}
        manager = Manager(how.manager, "Update", how.subresource)
        ownership.write(item, managers if managers is not None else ownership.updated(start, item, kind, manager, now()), kind)
        metadata["resourceVersion"] = before.get("resourceVersion", "")
        if how.dry_run or (live is not None and item == live):
            return item
        return as_kind(self._store(kind, name, item), kind)

    def _store(self, kind: Kind, name: Name, item: Object) -> Object:
        metadata = item["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            return self.remove_finished(kind, name) or item
        if kind.kind == "CustomResourceDefinition":
            self.kinds.define(item)
            established = {
                "type": "Established",
                "status": "True",
                "reason": "InitialNamesAccepted",
                "message": "",
                "lastTransitionTime": now(),
            }
            item["status"] = {"conditions": [established], "acceptedNames": item["spec"]["names"], "storedVersions": []}
        return self.store.put((kind.group, kind.plural), name, item)

    def _admitted(self, kind: Kind, live: Object | None, item: Object, how: Write) -> Object:
        """The object with its defaults. Raises Fault for all that is wrong with it."""
        item = copy.deepcopy(item)
        admission.set_defaults(kind, item)
        admitted = admit(item, kind.as_custom(), live)
        if admitted.unknown and how.validation == "Strict":
            raise bad_request("strict decoding error: " + ", ".join(f'unknown field "{path}"' for path in admitted.unknown))
        parted = [tuple(line.split(": ", 1)) for line in admitted.problems]
        wrong = [(path, text) for path, text in parted] + admission.problems(kind, admitted.stored, live)
        if wrong:
            raise invalid(kind.group, kind.kind, item["metadata"]["name"], wrong)
        if admission.is_too_large(admitted.stored):
            raise Fault(500, "", "etcdserver: request is too large")
        return admitted.stored


def as_kind(item: Object, kind: Kind) -> Object:
    """The object as one of this version."""
    return {**item, "apiVersion": kind.api_version, "kind": kind.kind}


def _require_name(item: Object, name: str) -> None:
    found = item["metadata"].get("name")
    if found != name:
        raise bad_request(f"the name of the object ({found}) does not match the name on the URL ({name})")


def now() -> str:
    """The time as an object's metadata has it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _content(item: Object) -> Object:
    """What a controller acts on: the object without its metadata and status."""
    return {key: value for key, value in item.items() if key not in ("metadata", "status")}
