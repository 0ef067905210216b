"""Two real replicas behind one address."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


def made_by_replica(url: str) -> dict[str, float]:
    """Tokens made, by replica, from one scrape."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    (family,) = [family for family in families if family.name == "vllm:generation_tokens"]
    return {sample.labels["replica"]: sample.value for sample in family.samples if sample.name.endswith("_total")}


def test_metrics_any_replica_answers_for_both(start_toy_server: Callable[..., Any]) -> None:
    server = start_toy_server(num_replicas=2)
    try:
        server.wait_ready()
        body = {"model": "toy", "prompt": "lamp", "max_tokens": 4, "ignore_eos": True}
        deadline_s = time.monotonic() + 60
        while len(made_by_replica(server.url)) < 2:  # the second may start a moment later
            assert time.monotonic() < deadline_s, "the second replica is not there in time"
        for _ in range(20):
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        scrapes = [made_by_replica(server.url) for _ in range(6)]
        assert all(scrape == scrapes[0] for scrape in scrapes)
        assert sum(scrapes[0].values()) == 80
        assert len(scrapes[0]) == 2
    finally:
        server.stop()
