"""Finds the calls of tools in what a model writes, as it writes it.

- Two forms are read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the answer (Hermes, Qwen), and bare JSON
  objects of the same kind at its start, one after the other, with nothing but space between (what the smart-home model writes).
- `parameters` is read as `arguments`, and both as an object or as its JSON text.
- A call is told once it is complete. Whatever is not a call of a known tool stays text, exactly as it was written.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving.stop_strings import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class FoundCall:
    """One call of a tool."""

    index: int
    id: str
    name: str
    arguments: str
    """JSON text of one object."""

    @property
    def body(self) -> dict[str, Any]:
        """The call as the API writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCalls:
    """Splits one answer into text and calls of `names`; of several calls only the first is one with `is_single`."""

    def __init__(self, names: frozenset[str], is_single: bool = False) -> None:
        self._names = names
        self._is_single = is_single
        self._held = ""
        self._read: Callable[[], tuple[str, FoundCall | None] | None] = self._read_bare
        self.num_found = 0

    def feed(self, text: str) -> tuple[str, list[FoundCall]]:
        """The text and the calls that are certain by now."""
        if not self._names:
            return text, []
        self._held += text
        shown, calls = "", []
        while (part := self._read()) is not None:
            shown += part[0]
            calls += [part[1]] if part[1] is not None else []
        return shown, calls

    def flush(self) -> str:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, ""
        return held

    def _read_bare(self) -> tuple[str, FoundCall | None] | None:
        """One bare call at the start; what is no JSON object ends this form."""
        start = len(self._held) - len(self._held.lstrip())
        if start == len(self._held):
            return None
        if self._held[start] == "{":
            if "}" not in self._held:
                return None
            try:
                value, end = json.JSONDecoder().raw_decode(self._held, start)
            except (ValueError, RecursionError) as error:
                # An error at the very end may be an object that is not complete yet; before it, no further text mends it.
                if isinstance(error, json.JSONDecodeError) and _may_go_on(error, self._held):
                    return None
            else:
                if call := self._call(value):
                    self._held = self._held[end:]
                    return "", call
        self._read = self._read_tagged
        return "", None

    def _read_tagged(self) -> tuple[str, FoundCall | None] | None:
        """Text up to the next tag, or the call within it."""
        place = self._held.find(OPEN)
        if place:
            num_shown = place if place > 0 else len(self._held) - overlap(self._held, OPEN)
            shown, self._held = self._held[:num_shown], self._held[num_shown:]
            return (shown, None) if shown else None
        end = self._held.find(CLOSE)
        if end < 0:
            return None
        whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
        try:
            call = self._call(json.loads(whole[len(OPEN) : end]))
        except (ValueError, RecursionError):
            call = None
        return ("", call) if call else (whole, None)

    def _call(self, value: Any) -> FoundCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names or (self._is_single and self.num_found):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict) or set(value) - {"name", "arguments", "parameters"}:
            return None
        text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
        self.num_found += 1
        return FoundCall(self.num_found - 1, f"call_{uuid.uuid4().hex[:24]}", value["name"], text)


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the object could still become valid: it broke where the text ends, or within a string or word that the end cuts."""
    rest = text[error.pos :].strip()
    return not rest or error.msg.startswith("Unterminated string") or any(word.startswith(rest) for word in ("true", "false", "null", "-"))
