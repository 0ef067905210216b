"""What a server is doing, from two looks at its `/metrics`; ours, or any that uses vLLM's names.

- Rates are over the time between the looks. So are times and shares, unless nothing was counted between them: then they are over all since
  the server started, and `over` says so.
- A quantile is read out of a histogram's buckets, as Prometheus does it: straight lines within a bucket; beyond the last bound, that bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

from infra.errors import ConfigError

Over = Literal["interval", "start"]
Counts = dict[tuple[str, str], float]
"""Values by name and, of a bucket, upper bound."""

MADE, READ = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
FIRST_TOKEN, BETWEEN_TOKENS = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
RUNNING, WAITING, CACHE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
PREFIX_QUERIES, PREFIX_HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
REFUSED, IS_UP = "slipway_requests_refused_total", "slipway_engine_up"
FRONT = "slipway_front_"
REPLICA_LABELS = ("replica", "engine")  # ours, and vLLM's


@dataclass(frozen=True)
class Front:
    """What requests meet before a replica; a server of vLLM's has none. Counts are since the start."""

    num_held: int
    """Requests that wait for a replica to be ready."""
    in_flight: Mapping[str, int]
    """Requests at each replica."""
    retries: Mapping[str, int]
    """Requests asked again, by why."""
    refused: Mapping[str, int]
    """Requests that reached no replica, by HTTP status."""


@dataclass(frozen=True)
class Look:
    """The figures at one moment."""

    moment_s: float
    models: tuple[str, ...]
    replicas: Mapping[str, Counts]
    front: Front | None


@dataclass(frozen=True)
class Times:
    """How long something took, in seconds."""

    p50: float
    p99: float
    num: int
    """How often it was measured."""
    over: Over
    is_beyond: bool
    """Whether the 99th percentile lies beyond the last bucket's bound, which is what `p99` then is."""


@dataclass(frozen=True)
class Share:
    """A part of a whole, from 0 to 1."""

    value: float
    over: Over


@dataclass(frozen=True)
class Figures:
    """One replica, or all."""

    made_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_s: Times | None
    """To the first token; absent before the first answer."""
    itl_s: Times | None
    """Between tokens."""
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Of all: the mean of the replicas."""
    prefix_hit_rate: Share | None
    """Tokens of prompts that the prefix cache held; absent where the engine does not tell, as OpenVINO's does not."""
    acceptance: Share | None
    """Tokens guessed ahead that were right; absent where none were guessed."""
    num_refused: int
    """Requests that found the queue full, since the start."""
    refused_per_s: float
    is_up: bool
    """Whether every engine can answer."""


@dataclass(frozen=True)
class Live:
    """What a server is doing."""

    models: tuple[str, ...]
    interval_s: float
    replicas: Mapping[str, Figures]
    all: Figures
    front: Front | None


def read(text: str, moment_s: float) -> Look:
    """One look. Raises ConfigError where the text holds no figures of a served model."""
    models: dict[str, None] = {}
    replicas: dict[str, Counts] = {}
    front: dict[str, dict[str, int]] = {}
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError("what answers there gives no figures. Give the --url of a served model.") from error
    for name, labels, value, *_ in samples:
        if name.startswith(FRONT):
            cause = next((text for label, text in labels.items() if label != "model_name"), "")
            front.setdefault(name.removeprefix(FRONT), {})[cause] = int(value)
        elif name.startswith(("vllm:", "slipway_")) and "model_name" in labels:
            models[labels["model_name"]] = None
            counts = replicas.setdefault(next((labels[label] for label in REPLICA_LABELS if label in labels), ""), {})
            key = (name, labels.get("le", ""))
            counts[key] = max(counts.get(key, 0.0), value) if name == CACHE else counts.get(key, 0.0) + value
    if not (replicas or front):
        raise ConfigError("what answers there tells figures, but none of a served model. Give the --url of one.")
    return Look(moment_s, tuple(models), replicas, _front(front) if front else None)


def compare(before: Look, after: Look) -> Live:
    """What happened between two looks. A replica that the first did not see counts from the second on."""
    interval_s = after.moment_s - before.moment_s
    gained = {name: _gained(before.replicas.get(name, counts), counts) for name, counts in after.replicas.items()}
    replicas = {name: _figures(gained[name], counts, interval_s, 1) for name, counts in after.replicas.items()}
    together = _figures(_sum(gained.values()), _sum(after.replicas.values()), interval_s, len(replicas))
    return Live(after.models, interval_s, replicas, together, after.front)


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """The value that `share` of the observations do not exceed; `buckets` counts those up to each bound, infinity among them."""
    rank, low, num_below = share * buckets[math.inf], 0.0, 0.0
    for bound in sorted(buckets):
        if buckets[bound] >= rank:
            return low if math.isinf(bound) else low + (bound - low) * (rank - num_below) / (buckets[bound] - num_below)
        low, num_below = bound, buckets[bound]
    return low


def _front(found: Mapping[str, Mapping[str, int]]) -> Front:
    num_held = sum(found.get("requests_held", {}).values())
    return Front(num_held, *(found.get(name, {}) for name in ("requests_in_flight", "retries_total", "refused_total")))


def _gained(before: Counts, after: Counts) -> Counts:
    """What counters have gained; one that is smaller than before began anew."""
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {key: after[key] if value < 0 else value for key, value in gained.items()}


def _sum(several: Iterable[Counts]) -> Counts:
    total: Counts = {}
    for counts in several:
        for key, value in counts.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _figures(gained: Counts, counts: Counts, interval_s: float, num_replicas: int) -> Figures:
    def rate(name: str) -> float:
        return gained.get((name, ""), 0.0) / interval_s

    def now(name: str) -> float:
        return counts.get((name, ""), 0.0)

    return Figures(
        made_tokens_per_s=rate(MADE),
        prompt_tokens_per_s=rate(READ),
        ttft_s=_times(gained, counts, FIRST_TOKEN),
        itl_s=_times(gained, counts, BETWEEN_TOKENS),
        num_running=int(now(RUNNING)),
        num_waiting=int(now(WAITING)),
        kv_cache_usage=now(CACHE) / max(num_replicas, 1),
        prefix_hit_rate=_share(gained, counts, PREFIX_HITS, PREFIX_QUERIES),
        acceptance=_share(gained, counts, ACCEPTED, DRAFTED),
        num_refused=int(now(REFUSED)),
        refused_per_s=rate(REFUSED),
        is_up=counts.get((IS_UP, ""), num_replicas) >= num_replicas,
    )


def _times(gained: Counts, counts: Counts, name: str) -> Times | None:
    for found, over in ((gained, "interval"), (counts, "start")):
        buckets = {float(bound): value for (key, bound), value in found.items() if key == f"{name}_bucket"}
        if num := buckets.get(math.inf):
            p99 = quantile(buckets, 0.99)
            last = max(bound for bound in buckets if not math.isinf(bound))
            return Times(quantile(buckets, 0.5), p99, int(num), over, is_beyond=0.99 * num > buckets[last])  # type: ignore[arg-type]
    return None


def _share(gained: Counts, counts: Counts, part: str, whole: str) -> Share | None:
    for found, over in ((gained, "interval"), (counts, "start")):
        if num_all := found.get((whole, "")):
            return Share(found.get((part, ""), 0.0) / num_all, over)  # type: ignore[arg-type]
    return None
