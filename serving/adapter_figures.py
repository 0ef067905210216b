"""What Prometheus can read of the adapters beside a model; nothing where there are none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily


class Use:
    """One request of an adapter, from its arrival to its end."""

    def __init__(self, figures: AdapterFigures, adapter: str | None) -> None:
        self._figures = figures
        self._adapter = adapter
        self._counted: Counter[str] | None = None
        self._count(figures.waiting)

    def begin(self, num_prompt: int) -> None:
        """It has a place in the batch."""
        self._count(self._figures.running)
        if self._adapter is not None:
            self._figures.began(self._adapter, num_prompt)

    def end(self) -> None:
        """It is done, or its client has left."""
        self._count(None)

    def _count(self, among: Counter[str] | None) -> None:
        if self._adapter is None:
            return
        if self._counted is not None:
            self._counted[self._adapter] -= 1
        if among is not None:
            among[self._adapter] += 1
        self._counted = among


class AdapterFigures:
    """Requests and tokens by adapter; requests for the model alone are not counted here."""

    def __init__(self, registry: CollectorRegistry, label_names: Sequence[str], labels: Sequence[str], max_held: int) -> None:
        self._label_names, self._labels = label_names, labels
        self._max_held = max_held
        self.waiting: Counter[str] = Counter()
        """Requests of each adapter that wait for a place."""
        self.running: Counter[str] = Counter()
        """Those that have one."""
        if max_held:
            names = [*label_names, "adapter"]
            self._requests = Total("slipway_adapter_requests", "Requests by adapter.", names, registry=registry)
            self._prompt = Total("slipway_adapter_prompt_tokens", "Tokens of the prompts taken, by adapter.", names, registry=registry)
            self._made = Total("slipway_adapter_generation_tokens", "Tokens made, by adapter.", names, registry=registry)
            registry.register(self)

    def began(self, adapter: str, num_prompt: int) -> None:
        """A request of it has got a place."""
        self._requests.labels(*self._labels, adapter).inc()
        self._prompt.labels(*self._labels, adapter).inc(num_prompt)

    def made(self, adapter: str | None, num_tokens: int) -> None:
        """A request of it got tokens."""
        if adapter is not None:
            self._made.labels(*self._labels, adapter).inc(num_tokens)

    def collect(self) -> list[GaugeMetricFamily]:
        """What is so now, in the form that vLLM's dashboards read: names as labels, and the time as the value."""
        now = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that requests run on and wait for, as labels; the value is the time.",
            labels=[*self._label_names, "max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        names = (",".join(sorted(+counts)) for counts in (self.waiting, self.running))
        now.add_metric([*self._labels, str(self._max_held), *names], time.time())
        return [now]
