"""Traces out of a real server: its variables reach the replica, and what neither has sent yet is sent when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.unit.collector import collecting

CLIENTS_TRACE, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_server_that_ends_has_sent_every_trace_of_front_and_replica(
    start_toy_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs a server of its own: one that knows the collector, and that ends."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "lamps")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        server = start_toy_server()
        try:
            server.wait_ready()
            body = {"model": "toy", "prompt": "lamp", "max_tokens": 12, "ignore_eos": True}
            headers = {"traceparent": f"00-{CLIENTS_TRACE}-{CLIENTS_SPAN}-01", "X-Request-Id": "mine-9"}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30).status_code == 200
            assert not collector.spans
        finally:
            server.stop()
    front, replica = collector.one("POST /v1/completions"), collector.one("text_completion toy")
    (ask,) = collector.children(front)
    assert (front.trace_id, front.parent_id, replica.parent_id) == (CLIENTS_TRACE, CLIENTS_SPAN, ask.span_id)
    assert [part.name for part in collector.children(replica)] == ["queue", "prefill", "decode"]
    assert replica.attributes["gen_ai.usage.output_tokens"] == 12
    assert {span.resource["service.name"] for span in collector.spans} == {"lamps"}
    assert replica.resource["service.instance.id"] == ask.attributes["slipway.replica"]
    lines = [json.loads(line) for path in server.output_dir.glob("requests-*.jsonl") for line in path.read_text().splitlines()]
    assert [line["trace_id"] for line in lines if line["request_id"] == "mine-9"] == [CLIENTS_TRACE]
