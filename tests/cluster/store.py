"""Objects with versions, and the history of their changes for those who watch.

One counter gives every change its resourceVersion. The history is kept until `compact`; whoever asks for changes since an older version
is told that it is gone.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
Name = tuple[str, str]
"""Namespace, empty where the kind has none, and name."""
KindKey = tuple[str, str]
"""Group and plural: the versions of a kind share their objects."""


@dataclass(frozen=True)
class Change:
    """One change of one object."""

    version: int
    kind: KindKey
    name: Name
    before: Object | None
    after: Object | None
    """None where it was deleted."""
    last: Object
    """The object as changed; of a deleted one, as it was, with the version of the deletion."""


class Store:
    """All objects. Every method takes the lock by itself; `changed` is notified after each change."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1
        self.oldest = 0
        """Changes up to this version are no longer known."""
        self._objects: dict[KindKey, dict[Name, Object]] = {}
        self._history: list[Change] = []

    def get(self, kind: KindKey, name: Name) -> Object | None:
        """A copy of the object."""
        with self.changed:
            return copy.deepcopy(self._objects.get(kind, {}).get(name))

    def find(self, kind: KindKey, namespace: str | None, wanted: Callable[[Object], bool]) -> tuple[list[Object], int]:
        """Copies of the objects of a kind, by name, and the version of it all; of every namespace where it is None."""
        with self.changed:
            found = [
                item for (place, _), item in sorted(self._objects.get(kind, {}).items()) if namespace in (None, place) and wanted(item)
            ]
            return copy.deepcopy(found), self.version

    def everywhere(self) -> list[tuple[KindKey, Name, Object]]:
        """All objects, to look at only."""
        with self.changed:
            return [(kind, name, item) for kind, items in self._objects.items() for name, item in items.items()]

    def put(self, kind: KindKey, name: Name, item: Object) -> Object:
        """Stores the object under a new version; gives it back with that."""
        return self._record(kind, name, item, "put")

    def drop(self, kind: KindKey, name: Name) -> Object | None:
        """Takes the object out; gives it as it was, with the version of its deletion."""
        with self.changed:
            item = self._objects.get(kind, {}).get(name)
            return self._record(kind, name, item, "drop") if item is not None else None

    def _record(self, kind: KindKey, name: Name, item: Object, what: Literal["put", "drop"]) -> Object:
        with self.changed:
            self.version += 1
            item = copy.deepcopy(item)
            item["metadata"]["resourceVersion"] = str(self.version)
            items = self._objects.setdefault(kind, {})
            before = items.get(name)
            if what == "put":
                items[name] = item
            else:
                del items[name]
            self._history.append(Change(self.version, kind, name, before, item if what == "put" else None, item))
            self.changed.notify_all()
            return copy.deepcopy(item)

    def compact(self) -> None:
        """Forgets the history, as a real server does after some minutes; those who watch already go on."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self._history.clear()
            self.changed.notify_all()

    def changes_since(self, version: int, timeout_s: float) -> tuple[list[Change], int] | None:
        """What changed after `version`, waiting for it up to `timeout_s`, and up to which version; None where that is forgotten."""
        with self.changed:
            if self.version == version and timeout_s > 0:
                self.changed.wait(timeout_s)
            if version < self.oldest - 1:
                return None
            return [change for change in self._history if change.version > version], self.version
