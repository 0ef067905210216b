"""Ends an answer at a stop string, wherever the borders between tokens fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on as it comes, holding back what could be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """The part of all text so far that may be shown now; sets `is_found` at the first stop string, which is never shown."""
        if not self._stops:
            return text
        held = self._held + text
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return held[: min(found)]
        num_held = max(overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def flush(self) -> str:
        """What was held back, once the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that starts `stop`, the whole of it excluded."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
