"""Messages between an engine and the process that computes for it: JSON, a line each.

- To the process: `{"stream_interval_s", "settings"}`, then `{"add": number, "ids", "sampling"}` and `{"cancel": number}`; the end of the
  stream ends the process.
- From it: `{"ready": true}`, then after a step `{"news": [News, ...], "figures": [running, waiting, cache share],
  "adapters": [name, ...]}`; last `{"failure": text}` where it could not load or go on.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

RECEIVE_BYTES = 1 << 16

News = tuple[int, list[int], list[Any] | None, str | None, str | None]
"""Number of the request, its new ids, their log-probabilities as `[own, [[id, own], ...]]` where asked for, why it ended, why it was
refused."""


_encode = json.JSONEncoder(separators=(",", ":")).encode  # made once: `json.dumps` makes one a call, for what it says of separators


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One message with its line end."""
    return _encode(message).encode() + b"\n"


class JsonLines:
    """Messages over a socket, for a process without an event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def read(self, wait: bool) -> list[Any]:
        """The messages that have arrived; with `wait` it returns with something new only. Raises EOFError when the other side closed."""
        try:
            data = self._connection.recv(RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def write(self, message: Mapping[str, Any]) -> None:
        """Sends one message; waits where the other side is behind."""
        self._connection.sendall(encode_message(message))
