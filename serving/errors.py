"""HTTP errors in the shape that OpenAI clients know: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is answered with an error; `param` names the field at fault, `code` lets a program tell the cases apart.

    `retry_after_s` says in whole seconds when the same request may do better.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = RETRY_AFTER_S if retry_after_s is None and status == 503 else retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = SERVER_ERROR if self.status >= 500 else RATE_LIMIT if self.status == 429 else INVALID_REQUEST
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers beside the body."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
