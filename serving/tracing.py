"""Traces of requests, where OpenTelemetry's own variables name a collector; `otlp.py` makes them.

- Where they name none, a `Tracer` and its spans do nothing, and nothing of OpenTelemetry's SDK is loaded.
- A span holds names, counts and times: never a word of a prompt or an answer, and no message of an error, which may quote one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multidict import CIMultiDict

from infra.settings import traces_are_wanted

Value = str | int | float | bool | Sequence[str]
STATUS_ATTRIBUTE = "http.response.status_code"
QUIET_PATHS = ("/health", "/metrics")  # asked every few seconds by machines


class Span:
    """One part of the work on a request. This one is not recorded: it stands where nobody wants traces."""

    is_recorded = False
    trace_id = ""
    """32 hexadecimal digits; empty where there is no trace."""

    def child(self, name: str, attributes: Mapping[str, Value], is_call: bool = False) -> Span:
        """A part of this part, begun now; `is_call`: it waits for another server."""
        return self

    def past(self, name: str, begun_s: float, ended_s: float) -> None:
        """Tells of a part that is over; seconds on the clock of `time.perf_counter`."""

    def rename(self, name: str) -> None:
        """Gives it a name that was not known when it began."""

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Tells something of it."""

    def fail(self, kind: str) -> None:
        """Tells that it failed, by a word for the kind of error."""

    def onward(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        """The headers by which another server continues the trace from here; `headers` themselves are not changed."""
        return headers

    def end(self) -> None:
        """It is over."""


NO_SPAN = Span()


class Tracer:
    """Begins the spans of one process, and sends them away. This one does neither."""

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Span:
        """The span of a request that has arrived, in its client's trace where the headers name one."""
        return NO_SPAN

    def flush(self) -> None:
        """Sends what has ended; returns when it is sent, or when the collector has had its time."""

    def stop(self) -> None:
        """Sends what has ended, and nothing after."""


def make_tracer(instance: str) -> Tracer:
    """A tracer that does what the environment asks for; `instance` tells this process from others. Raises ConfigError."""
    if not traces_are_wanted():
        return Tracer()
    from serving.otlp import OtlpTracer

    return OtlpTracer(instance)


def end_request(span: Span, status: int | None, outcome: str = "done") -> None:
    """Ends the span of a request that was answered with `status`, or with none; `outcome` is what the request log says."""
    span.note({"slipway.outcome": outcome})
    if status is not None:
        span.note({STATUS_ATTRIBUTE: status})
    if outcome in ("deadline", "failed"):
        span.fail(outcome)
    elif status is not None and status >= 500:
        span.fail(str(status))
    span.end()
