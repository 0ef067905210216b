"""What Prometheus can read of one replica; the names are a public interface."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

from serving.engines.base import Engine

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BETWEEN_TOKENS_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
REQUEST_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60, 120)


@dataclass(frozen=True)
class Metrics:
    """The figures of one model on one replica."""

    model_name: str
    registry: CollectorRegistry
    requests: Counter
    prompt_tokens: Counter
    generated_tokens: Counter
    first_token: Histogram
    between_tokens: Histogram
    request_duration: Histogram


def make_metrics(model_name: str, engine: Engine) -> Metrics:
    """New figures in a registry of their own, so that several models, or tests, never share one."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(model_name, engine))

    def counter(name: str, text: str) -> Counter:
        return Counter(name, text, ["model"], registry=registry).labels(model=model_name)

    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model"], registry=registry, buckets=buckets).labels(model=model_name)

    return Metrics(
        model_name=model_name,
        registry=registry,
        requests=Counter("slipway_requests_total", "Requests by path and HTTP status.", ["model", "path", "status"], registry=registry),
        prompt_tokens=counter("slipway_prompt_tokens_total", "Tokens of the prompts taken."),
        generated_tokens=counter("slipway_generated_tokens_total", "Tokens made."),
        first_token=histogram("slipway_time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN_BUCKETS_S),
        between_tokens=histogram("slipway_inter_token_seconds", "Mean time a token since the last chunk.", BETWEEN_TOKENS_BUCKETS_S),
        request_duration=histogram(
            "slipway_request_duration_seconds", "From request to last token, or to the client's leaving.", REQUEST_BUCKETS_S
        ),
    )


class _EngineCollector:
    """Asks the engine when Prometheus asks us."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> list[GaugeMetricFamily]:
        figures = self._engine.figures
        return [
            self._gauge("slipway_running_requests", "Requests that are being answered.", figures.num_running),
            self._gauge("slipway_waiting_requests", "Requests that wait for a place.", figures.num_waiting),
            self._gauge("slipway_cache_usage_ratio", "Share of the KV cache that holds tokens.", figures.cache_usage),
            self._gauge("slipway_engine_up", "1 while the engine can answer.", float(self._engine.failure is None)),
        ]

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model"])
        family.add_metric([self._model_name], value)
        return family
