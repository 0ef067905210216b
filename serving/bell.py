"""How a gateway, which is no part of Ray, has a replica started: it asks Ray Serve's proxy for the bell of the application."""

from __future__ import annotations

import logging
import threading
import time
import urllib.request

from serving.announcement import TOKEN_HEADER
from serving.wake import AGAIN_S

TIMEOUT_S = 5.0


class HttpBell:
    """Rings each time it is called, at most every `AGAIN_S`, on a thread of its own; does nothing without a `url`."""

    def __init__(self, url: str | None, token: str) -> None:
        self._url = url
        self._token = token
        self._next_s = 0.0

    def __call__(self) -> None:
        now_s = time.monotonic()
        if self._url is None or now_s < self._next_s:
            return
        self._next_s = now_s + AGAIN_S
        threading.Thread(target=self._ring, args=(self._url,), name="bell", daemon=True).start()

    def _ring(self, url: str) -> None:
        request = urllib.request.Request(url, headers={TOKEN_HEADER: self._token})
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
        except OSError as error:  # it is rung again as long as requests wait
            logging.getLogger("slipway.gateway").warning(f"{url} cannot be rung: {error}")
