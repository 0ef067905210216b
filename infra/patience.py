"""Tells an error of a store that will pass from one that will not, and tries again for as long as it may."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from infra.errors import TransientError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
ASK_AGAIN = (408, 425, 429)
T = TypeVar("T")


def waits_s() -> Iterator[float]:
    """Pauses between tries, in seconds: each twice the one before, up to a quarter of a minute."""
    return (min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) for number in itertools.count())


def will_pass(error: BaseException) -> bool:
    """Whether the store may take the same request later: it was away, or the connection was cut."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in ASK_AGAIN
    requests, botocore = sys.modules.get("requests"), sys.modules.get("botocore.exceptions")  # whoever raised it has them loaded
    kinds: tuple[Any, ...] = (ConnectionError, TimeoutError)
    kinds += (requests.RequestException,) if requests else ()
    kinds += (botocore.HTTPClientError, botocore.ConnectionError) if botocore else ()
    return isinstance(error, kinds) or (error.__cause__ is not None and will_pass(error.__cause__))


def patiently(action: Callable[[], T], what: str, patience_s: float) -> T:
    """What `action` gives, tried again while its error is one that will pass. Raises TransientError when `patience_s` are over."""
    deadline_s = time.monotonic() + patience_s
    for wait_s in waits_s():
        try:
            return action()
        except Exception as error:  # a library's edge: MLflow's stores raise errors of a dozen libraries
            if not will_pass(error):
                raise
            if time.monotonic() + wait_s > deadline_s:
                raise TransientError(
                    f"{what}: the store did not take it for {patience_s:.0f} s ({error}). Look at it, then run it again."
                ) from error
        time.sleep(wait_s)
    raise AssertionError("unreachable: there is always another wait")


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of MLflow, requests or botocore, where it has one."""
    if (of_mlflow := getattr(error, "get_http_status_code", None)) is not None:
        return int(of_mlflow())
    response = getattr(error, "response", None)
    status: int | None = getattr(response, "status_code", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status
