"""What an API server's refusals mean for the one who asked.

A refusal comes as a `Status` object: code, reason, message, and causes with the field that each is about.
Source: kubernetes/community, contributors/devel/sig-architecture/api-conventions.md, "Response Status Kind".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from infra.errors import ConfigError, SlipwayError, TransientError

WILL_PASS = (429, 500, 502, 503, 504)
# An apply of a field that the schema lacks is answered by 500, as if the server were at fault; no wait will make it right.
SCHEMA_FAULTS = ("failed to create typed patch object", "field not declared in schema", ".managedFields")


@dataclass(frozen=True)
class Answer:
    """What the API server said: a status code, and the object or the Status."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None

    @property
    def message(self) -> str:
        """The server's own words."""
        return str(self.body.get("message") or f"HTTP status {self.status}")

    @property
    def causes(self) -> list[dict[str, str]]:
        """One entry a fault, each with `field`, `reason` and `message` where the server gives them."""
        details = self.body.get("details") or {}
        return list(details.get("causes") or [])

    @property
    def will_pass(self) -> bool:
        """Whether the same request may be taken later."""
        if any(cause.get("reason") == "NamespaceTerminating" for cause in self.causes):
            return True
        return self.status in WILL_PASS and not any(words in self.message for words in SCHEMA_FAULTS)


def known_error(answer: Answer, purpose: str) -> SlipwayError:
    """The error for an answer that nobody expected; `purpose` says what was asked, such as `apply RayJob ns/train`."""
    found = f"{purpose}: the cluster answered {answer.status}: {answer.message}"
    if answer.will_pass:
        return TransientError(f"{found}. Run the same command again; if it stays so, look at the API server and at its webhooks.")
    if answer.status == 409 and any(cause.get("reason") == "FieldManagerConflict" for cause in answer.causes):
        return ConfigError(_conflict(answer, purpose))
    if answer.status == 409:
        return TransientError(f"{found}. Somebody else changed it meanwhile; run the same command again.")
    return ConfigError(f"{found}. {_advice(answer)}")


def _conflict(answer: Answer, purpose: str) -> str:
    lines = [f"  - {cause.get('field')}: {cause.get('message')}" for cause in answer.causes]
    return (
        f"{purpose}: {len(lines)} field(s) belong to someone else\n"
        + "\n".join(lines)
        + "\nLeave these fields to their owner by taking them out of the values, or take them over by force."
    )


def _advice(answer: Answer) -> str:
    advice = {
        401: "The kubeconfig's credentials are not accepted: log in again, or choose another context.",
        403: "This account may not do that: give it the role, or choose another context (`kubectl auth can-i` shows what it may).",
        404: "Look whether the namespace and the kind exist in this cluster.",
        413: "The object is too large: an API server takes about 1.5 MB.",
    }
    if "immutable" in answer.message:
        return "This cannot be changed on an object that exists: delete the object, then apply it again."
    return advice.get(answer.status, "Change what it names, then run the command again.")
