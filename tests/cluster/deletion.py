"""What goes with a deleted object: what it owns, what lies in a namespace, what is of a kind; and what finalizers hold back.

On a cluster the garbage collector and the namespace controller do this a little later; here it is done at once.
Source: kubernetes.io/docs/concepts/architecture/garbage-collection
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.cluster.kinds import Kind
from tests.cluster.store import Name, Object

if TYPE_CHECKING:
    from tests.cluster.objects import Objects

FOREGROUND = "foregroundDeletion"


def delete(objects: Objects, kind: Kind, name: Name, propagation: str) -> Object:
    """Deletes an object and what goes with it, or marks it where finalizers hold it; gives it as it is then, or as it was."""
    from tests.cluster.objects import now

    live = objects.get(kind, name)
    for below, place in _within(objects, kind, live):
        _delete_if_there(objects, below, place, propagation)
    owned = _owned(objects, live)
    if propagation == "Orphan":
        for below, place in owned:
            _disown(objects, below, place, live["metadata"]["uid"])
    elif propagation == "Foreground":  # they go first, and hold the owner while finalizers hold them
        for below, place in owned:
            _delete_if_there(objects, below, place, propagation)
    is_held = bool(live["metadata"].get("finalizers")) or (propagation == "Foreground" and bool(_owned(objects, live)))
    if is_held and "deletionTimestamp" not in live["metadata"]:
        live["metadata"].update(deletionTimestamp=now(), deletionGracePeriodSeconds=0)
        live = objects.store.put((kind.group, kind.plural), name, live)
    elif not is_held:
        live = objects.remove_finished(kind, name) or live
        for below, place in owned if propagation == "Background" else ():
            _delete_if_there(objects, below, place, propagation)
    return live


def _delete_if_there(objects: Objects, kind: Kind, name: Name, propagation: str) -> None:
    if objects.store.get((kind.group, kind.plural), name) is not None:
        delete(objects, kind, name, propagation)


def _within(objects: Objects, kind: Kind, live: Object) -> list[tuple[Kind, Name]]:
    """What lies in a namespace, or is of a defined kind."""
    if kind.kind == "Namespace":
        return [(below, name) for below, name, _ in _all(objects) if below.is_namespaced and name[0] == live["metadata"]["name"]]
    if kind.kind == "CustomResourceDefinition":
        wanted = (live["spec"]["group"], live["spec"]["names"]["plural"])
        return [(below, name) for below, name, _ in _all(objects) if (below.group, below.plural) == wanted]
    return []


def _owned(objects: Objects, live: Object) -> list[tuple[Kind, Name]]:
    uid = live["metadata"]["uid"]
    return [(kind, name) for kind, name, item in _all(objects) if uid in {owner["uid"] for owner in _owners(item)}]


def _disown(objects: Objects, kind: Kind, name: Name, uid: str) -> None:
    item = objects.get(kind, name)
    item["metadata"]["ownerReferences"] = [owner for owner in _owners(item) if owner["uid"] != uid]
    objects.store.put((kind.group, kind.plural), name, item)


def _owners(item: Object) -> list[Object]:
    return item["metadata"].get("ownerReferences") or []


def _all(objects: Objects) -> list[tuple[Kind, Name, Object]]:
    kinds = {(kind.group, kind.plural): kind for kind in objects.kinds}
    return [(kinds[key], name, item) for key, name, item in objects.store.everywhere() if key in kinds]
