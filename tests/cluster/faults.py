"""Refusals, as an API server words them: a Status object with a code, a reason, and one cause a fault.

Source: k8s.io/apimachinery, pkg/api/errors/errors.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Fault(Exception):
    """A request that is refused."""

    def __init__(
        self, code: int, reason: str, message: str, details: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.headers = headers or {}

    def status(self) -> dict[str, Any]:
        """The body of the answer."""
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message, "reason": self.reason}
        return {**body, "details": self.details, "code": self.code}


def qualified(group: str, plural: str) -> str:
    """`deployments.apps`; a kind of the core group has no more than its plural."""
    return f"{plural}.{group}" if group else plural


def not_found(group: str, plural: str, name: str) -> Fault:
    """There is no such object."""
    details = {"name": name, "group": group, "kind": plural}
    return Fault(404, "NotFound", f'{qualified(group, plural)} "{name}" not found', details)


def no_such_path() -> Fault:
    """There is no such kind, version or verb."""
    return Fault(404, "NotFound", "the server could not find the requested resource")


def already_exists(group: str, plural: str, name: str) -> Fault:
    """A create of a name that is taken."""
    details = {"name": name, "group": group, "kind": plural}
    return Fault(409, "AlreadyExists", f'{qualified(group, plural)} "{name}" already exists', details)


def conflict(group: str, plural: str, name: str, why: str) -> Fault:
    """A write from an old version, or with a precondition that does not hold."""
    details = {"name": name, "group": group, "kind": plural}
    return Fault(409, "Conflict", f'Operation cannot be fulfilled on {qualified(group, plural)} "{name}": {why}', details)


def bad_request(message: str) -> Fault:
    """A body or a query that cannot be read."""
    return Fault(400, "BadRequest", message)


def invalid(group: str, kind: str, name: str, problems: Sequence[tuple[str, str]]) -> Fault:
    """An object with values that may not be: each problem a field and what is wrong with it."""
    causes = [{"reason": "FieldValueInvalid", "message": message, "field": field} for field, message in problems]
    listed = [f"{field}: {message}" for field, message in problems]
    text = listed[0] if len(listed) == 1 else "[" + ", ".join(listed) + "]"
    details = {"name": name, "group": group, "kind": kind, "causes": causes}
    return Fault(422, "Invalid", f'{qualified(group, kind)} "{name}" is invalid: {text}', details)


def gone() -> Fault:
    """A watch, or a page of a list, from a version that is no longer kept."""
    return Fault(410, "Expired", "The resourceVersion for the provided watch is too old.")
