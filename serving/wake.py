"""How a model that has no replica gets one: a call that waits at a handle of Ray Serve counts there as demand."""

from __future__ import annotations

import time
from typing import Any

AGAIN_S = 2.0  # a replica that was leaving may have taken the last call


class Waker:
    """Calls for a replica each time it is called, at most every `AGAIN_S`; does nothing before `start`."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._next_s = 0.0

    def start(self, deployment: str, application: str) -> None:
        """From now on calls go to this deployment; Ray Serve runs it already."""
        from ray import serve

        self._handle = serve.get_deployment_handle(deployment, application)

    def __call__(self) -> None:
        now_s = time.monotonic()
        if self._handle is None or now_s < self._next_s:
            return
        self._next_s = now_s + AGAIN_S
        self._handle.wake.remote()
