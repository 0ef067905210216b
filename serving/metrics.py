"""What Prometheus can read of a model's replicas; the names are a public interface.

- What vLLM measures too has vLLM's name, so that the dashboards people have go on working; the rest begins with `slipway_`.
- Every sample names its replica; the front answers a scrape for all of them, with its own figures (`front/figures.py`).
- What the prefix cache held is told of the engine vLLM only. OpenVINO's pipeline keeps such a cache and does not tell: for a prompt that it
  held whole and for a new one, its metrics, the request's own and the number of steps are the same, and only times differ. To count for it
  would be to guess what its block manager has thrown out.
- What is guessed ahead is counted where `serve.speculative` is set. vLLM and torch tell the guesses that there were; OpenVINO checks
  `num_tokens` of them at each step, found or not, and so many are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from serving.adapter_figures import AdapterFigures
from serving.admission import Gate
from serving.autoscaling.load import RecentTimes
from serving.engines.base import Engine, Figures

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BETWEEN_TOKENS_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
REQUEST_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60, 120)
LABELS = ("model_name", "replica")
FAMILY_MARK = "# HELP "


@dataclass(frozen=True)
class Metrics:
    """The figures of one model on one replica."""

    labels: tuple[str, str]
    """Values of `LABELS`."""
    registry: CollectorRegistry
    requests: Counter
    finished: Counter
    prompt_tokens: Counter
    generated_tokens: Counter
    first_token: Histogram
    recent_first_tokens: RecentTimes
    """The same times, the last seconds of them as they were: the autoscaling policy goes by them."""
    between_tokens: Histogram
    request_duration: Histogram
    queue_time: Histogram
    prefill_time: Histogram
    decode_time: Histogram
    adapters: AdapterFigures

    @property
    def text(self) -> str:
        """All figures in Prometheus' text format."""
        return str(generate_latest(self.registry), "utf-8")


def make_metrics(model_name: str, engine: Engine, gate: Gate, replica: str = "", max_adapters: int = 0) -> Metrics:
    """New figures in a registry of their own, so that several models, or tests, never share one; none of adapters where there are none."""
    registry, labels = CollectorRegistry(), (model_name, replica)
    registry.register(_LiveCollector(labels, engine, gate))

    def counter(name: str, text: str, *more: str) -> Counter:
        return Counter(name, text, [*LABELS, *more], registry=registry)

    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, registry=registry, buckets=buckets).labels(*labels)

    return Metrics(
        labels=labels,
        registry=registry,
        requests=counter("slipway_requests", "Requests by path and HTTP status.", "path", "status"),
        finished=counter("vllm:request_success", "Answers by why they ended.", "finished_reason"),
        prompt_tokens=counter("vllm:prompt_tokens", "Tokens of the prompts taken.").labels(*labels),
        generated_tokens=counter("vllm:generation_tokens", "Tokens made.").labels(*labels),
        first_token=histogram("vllm:time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN_BUCKETS_S),
        recent_first_tokens=RecentTimes(),
        between_tokens=histogram("vllm:inter_token_latency_seconds", "Mean time a token since the last chunk.", BETWEEN_TOKENS_BUCKETS_S),
        request_duration=histogram(
            "vllm:e2e_request_latency_seconds", "From request to last token, or to the client's leaving.", REQUEST_BUCKETS_S
        ),
        queue_time=histogram("vllm:request_queue_time_seconds", "From request to a place in the batch.", REQUEST_BUCKETS_S),
        prefill_time=histogram("vllm:request_prefill_time_seconds", "From a place in the batch to the first token.", REQUEST_BUCKETS_S),
        decode_time=histogram("vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST_BUCKETS_S),
        adapters=AdapterFigures(registry, LABELS, labels, max_adapters),
    )


def merge(texts: Sequence[str]) -> str:
    """The figures of several replicas as one text: each family once, with the samples of all."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for block in text.split(FAMILY_MARK)[1:]:
            head, samples = _head_and_samples(block)
            families.setdefault(head, []).append(samples)
    return "".join(FAMILY_MARK + head + "".join(samples) for head, samples in families.items())


def _head_and_samples(block: str) -> tuple[str, str]:
    """The two lines that describe a family, and its samples."""
    help_line, type_line, samples = block.split("\n", 2)
    return f"{help_line}\n{type_line}\n", samples


class _LiveCollector:
    """Asks the engine and the gate when Prometheus asks us."""

    def __init__(self, labels: tuple[str, str], engine: Engine, gate: Gate) -> None:
        self._labels = labels
        self._engine = engine
        self._gate = gate

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        figures, gate = self._engine.figures, self._gate
        num_waiting = gate.num_waiting + figures.num_waiting
        refused = CounterMetricFamily("slipway_requests_refused", "Requests that found the queue full.", labels=LABELS)
        refused.add_metric(self._labels, gate.num_refused)
        return [
            *self._told_counts(figures),
            self._gauge("vllm:num_requests_running", "Requests that are being answered.", figures.num_running),
            self._gauge("vllm:num_requests_waiting", "Requests that wait for a place in the batch.", num_waiting),
            self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache that holds tokens, from 0 to 1.", figures.cache_usage),
            self._gauge("slipway_engine_up", "1 while the engine can answer.", float(self._engine.failure is None)),
            self._gauge("slipway_retry_after_seconds", "What a request that found the queue full would be told.", gate.retry_after_s),
            refused,
        ]

    def _told_counts(self, figures: Figures) -> list[CounterMetricFamily]:
        """Nothing where the engine does not tell: 0 would say that nothing is ever found."""
        told = (
            ("vllm:prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for.", figures.prefix_asked_tokens),
            ("vllm:prefix_cache_hits", "Tokens of prompts that the prefix cache held.", figures.prefix_held_tokens),
            ("vllm:spec_decode_num_drafts", "Runs of tokens guessed ahead and checked.", figures.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead.", figures.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", figures.accepted_tokens),
        )
        families = []
        for name, text, value in told:
            if value is not None:
                family = CounterMetricFamily(name, text, labels=LABELS)
                family.add_metric(self._labels, value)
                families.append(family)
        return families

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family
