"""HTTP errors in the shape that OpenAI clients know: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is answered with an error; `param` names the field at fault, `code` lets a program tell the cases apart."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = INVALID_REQUEST if self.status < 500 else SERVER_ERROR
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers beside the body."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}
