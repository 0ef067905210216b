"""Messages between an engine and the process that computes for it: JSON, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One message with its line end."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
