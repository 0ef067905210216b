"""Figures on their way to a store that is there, away, back again, or that refuses them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import metric_stream, tracking
from infra.metric_stream import MetricStream
from infra.process import TrackingTarget


class Collector:
    """A server that speaks as much of MLflow's interface as logging a batch needs, and answers with `status`."""

    def __init__(self) -> None:
        self.status, self.batches = 200, list[dict[str, Any]]()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = b"{}"
                if collector.status == 200:
                    collector.batches.append(json.loads(body))
                else:
                    answer = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}).encode()
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def steps(self) -> list[int]:
        return [int(metric["step"]) for batch in self.batches for metric in batch["metrics"]]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


def target_of(collector: Collector, folder: Path, patience_s: float = 20.0) -> TrackingTarget:
    return TrackingTarget(uri=collector.uri, run_id="r", unsent_file=folder / "run" / "unsent" / "train.jsonl", patience_s=patience_s)


def wait_until(holds: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_stream_sends_what_was_queued_before_it_closes(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = tracking.client(uri)
    run_id = tracking.start_run(client, tracking.ensure_experiment(client, "tests", tmp_path / "artifacts"), "metrics")
    with MetricStream(TrackingTarget(uri=uri, run_id=run_id, unsent_file=tmp_path / "unsent.jsonl")) as stream:
        for step in range(3):
            stream.log({"loss": 3.0 - step}, step)
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert not (tmp_path / "unsent.jsonl").exists()


def test_store_that_comes_back_gets_everything_in_order_and_the_file_is_gone(collector: Collector, tmp_path: Path) -> None:
    target = target_of(collector, tmp_path)
    assert target.unsent_file is not None
    stream = MetricStream(target)
    stream.log({"loss": 0.0}, 0)
    wait_until(lambda: collector.steps == [0])
    collector.status = 503
    for step in range(1, 6):
        stream.log({"loss": 0.0}, step)
    wait_until(lambda: target.unsent_file.is_file() and len(target.unsent_file.read_text().splitlines()) == 5)
    assert metric_stream.send_left(tmp_path, collector.uri) == 1, "a stream that is at work keeps its file"
    assert collector.steps == [0]
    collector.status = 200
    stream.close()
    assert collector.steps == [0, 1, 2, 3, 4, 5]
    assert not target.unsent_file.exists()


def test_store_that_stays_away_leaves_a_file_that_a_later_run_sends(collector: Collector, tmp_path: Path) -> None:
    collector.status = 503
    target = target_of(collector, tmp_path, patience_s=0.2)
    assert target.unsent_file is not None
    before_ms = int(time.time() * 1000)
    with MetricStream(target) as stream:
        for step in range(3):
            stream.log({"loss": 0.5}, step)
    after_ms = int(time.time() * 1000)
    assert metric_stream.send_left(tmp_path, collector.uri) == 1, "still away"
    assert len(target.unsent_file.read_text().splitlines()) == 3, "trying again must not write them twice"
    with target.unsent_file.open("a") as file:
        file.write('{"uri": "cut o')
    collector.status = 200
    another = collector.uri.replace("127.0.0.1", "localhost")
    assert metric_stream.send_left(tmp_path, another) == 1, "of another store: not lost"
    assert collector.steps == [], "and not sent"
    assert metric_stream.send_left(tmp_path, collector.uri) == 0
    assert collector.steps == [0, 1, 2]
    times_ms = [int(metric["timestamp"]) for batch in collector.batches for metric in batch["metrics"]]
    assert all(before_ms <= time_ms <= after_ms for time_ms in times_ms), "as measured, not as sent"


def test_figure_that_the_store_refuses_does_not_hold_up_the_next(
    collector: Collector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = MetricStream(target_of(collector, tmp_path))
    collector.status = 400
    stream.log({"loss": 0.0}, 0)
    wait_until(lambda: "refused" in caplog.text)
    collector.status = 200
    stream.log({"loss": 0.0}, 1)
    stream.close()
    assert collector.steps == [1]


def test_stream_without_a_run_does_nothing() -> None:
    with MetricStream(None) as stream:
        stream.log({"loss": 1.0}, 1)
        stream.log_table({"a": [1]}, "t.json")
