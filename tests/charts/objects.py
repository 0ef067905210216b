"""Finds things in rendered manifests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Manifest = dict[str, Any]


def only(objects: Sequence[Manifest], kind: str, ending: str = "") -> Manifest:
    """The one object of a kind whose name ends so."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{len(found)} of kind {kind} ending in {ending!r} in {[(o['kind'], o['metadata']['name']) for o in objects]}"
    return found[0]


def pod_templates(node: Any) -> Iterator[Manifest]:
    """Every pod template in an object or a list of them, however deep."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def environment(container: Manifest) -> dict[str, str]:
    """A container's plain variables."""
    return {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
