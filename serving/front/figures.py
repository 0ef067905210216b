"""What Prometheus can read of the front; the names are a public interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily

from serving.front.replicas import Replicas

RetryReason = Literal["lost", "full", "failed"]
"""The replica ended before it answered; had no place and no seat; said that its engine cannot answer."""
RETRY_REASONS: tuple[RetryReason, ...] = ("lost", "full", "failed")
MODEL_LABEL = "model_name"


class FrontFigures:
    """The figures of one front; `num_held` tells how many requests wait for a replica to be ready."""

    def __init__(self, model_name: str, replicas: Replicas, num_held: Callable[[], int]) -> None:
        self._model_name = model_name
        self._replicas = replicas
        self._num_held = num_held
        self._registry = CollectorRegistry()
        self._registry.register(self)
        retried, refused = "Requests asked again at a replica, by why.", "Requests that the front itself refused, by HTTP status."
        self._retries = Counter("slipway_front_retries", retried, [MODEL_LABEL, "reason"], registry=self._registry)
        self._refused = Counter("slipway_front_refused", refused, [MODEL_LABEL, "status"], registry=self._registry)
        for reason in RETRY_REASONS:  # 0 before the first, so that rates see it
            self._retries.labels(model_name, reason)

    @property
    def text(self) -> str:
        """All figures in Prometheus' text format."""
        return str(generate_latest(self._registry), "utf-8")

    def note_retry(self, reason: RetryReason) -> None:
        """A request is asked again."""
        self._retries.labels(self._model_name, reason).inc()

    def note_refusal(self, status: int) -> None:
        """A request is refused by the front itself."""
        self._refused.labels(self._model_name, str(status)).inc()

    def collect(self) -> list[GaugeMetricFamily]:
        """What is so now; the registry calls it."""
        held = GaugeMetricFamily("slipway_front_requests_held", "Requests that wait for a replica to be ready.", labels=[MODEL_LABEL])
        held.add_metric([self._model_name], self._num_held())
        in_flight = GaugeMetricFamily(
            "slipway_front_requests_in_flight", "Requests sent to a replica and not yet answered.", labels=[MODEL_LABEL, "replica"]
        )
        for replica in self._replicas.all:
            in_flight.add_metric([self._model_name, replica.name], replica.num_running)
        return [held, in_flight]
