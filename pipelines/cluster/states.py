"""What the state of an object of the cluster means for whoever waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import SlipwayError

Phase = Literal["waiting", "running", "done", "troubled", "failed"]
"""`troubled`: something is wrong that may pass by itself. `failed`: it stays so until someone acts."""
Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How far an object is, in words, and the error to raise where it is troubled or failed."""

    phase: Phase
    text: str
    error: SlipwayError | None = None


def troubled(error: SlipwayError) -> Verdict:
    """Wrong now; whoever waits goes on waiting, and raises the error when patience ends."""
    return Verdict("troubled", error.message, error)


def failed(error: SlipwayError) -> Verdict:
    """Wrong for good."""
    return Verdict("failed", error.message, error)


def status_of(manifest: Manifest) -> Manifest:
    """The object's status; empty where its controller has not looked at it yet."""
    return manifest.get("status") or {}


def condition(manifest: Manifest, kind: str) -> Manifest:
    """One condition of the object's status by its type; empty where it is not there."""
    return next((each for each in status_of(manifest).get("conditions") or () if each.get("type") == kind), {})


def holds(manifest: Manifest, kind: str) -> bool:
    """Whether the condition is there and true."""
    return condition(manifest, kind).get("status") == "True"


def is_current(manifest: Manifest) -> bool:
    """Whether the status speaks of the newest spec; a controller that tells no generation is believed."""
    observed, wanted = status_of(manifest).get("observedGeneration"), manifest["metadata"].get("generation")
    return observed is None or wanted is None or observed >= wanted


def label(manifest: Manifest) -> str:
    """`Kind name`, for messages."""
    return f"{manifest.get('kind', 'object')} {manifest['metadata']['name']}"
