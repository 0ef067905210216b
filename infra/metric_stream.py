"""A worker's figures on their way to MLflow: a slow store never slows a step, and one that is away loses nothing.

- One background thread sends. What the store does not take is written to a file beside the run, in the order it came, and tried again
  with growing pauses; new figures line up behind it.
- `close` waits for the store as long as it was told. What is left then stays in the file, and `send_left` of a later command sends it.
- A metric keeps the time at which it was measured, so one sent twice is the same one to MLflow. Rows of a table may then be there twice.
- A figure that the store refuses for what it is (a bad name) is given up with a warning: it would be refused for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from infra.patience import waits_s, will_pass
from infra.process import TrackingTarget
from infra.tracking import client, log_metrics

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)


def send_left(folder: Path, uri: str) -> int:
    """Sends what earlier runs could not, from the files of unsent figures below `folder`; how many files are left over."""
    left = 0
    for path in sorted(folder.glob("*/unsent/*.jsonl")):
        with contextlib.suppress(Timeout), _lock(path):  # a stream that is at work has it
            entries = [entry for entry in _entries(path) if entry["uri"] == uri]
            MetricStream(TrackingTarget(uri=uri, run_id="", unsent_file=path, patience_s=0.0), entries).close()
        left += path.exists()
    return left


def _lock(path: Path, timeout_s: float = 0.0) -> FileLock:
    """Held by who writes or empties the file of unsent figures."""
    return FileLock(path.with_name(path.name + ".lock"), timeout=timeout_s)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """What the file holds; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _send(mlflow: MlflowClient, entry: Mapping[str, Any]) -> None:
    if "table" in entry:
        mlflow.log_table(entry["run_id"], entry["columns"], entry["table"])
    else:
        log_metrics(mlflow, entry["run_id"], entry["metrics"], entry["step"], entry["time_ms"])


class MetricStream:
    """Sends figures to the run of `target` from one background thread; does nothing without one. `left` was not sent before."""

    def __init__(self, target: TrackingTarget | None, left: list[dict[str, Any]] | None = None) -> None:
        self._target = target
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._unsent: list[dict[str, Any]] = list(left or [])
        self._num_kept = len(self._unsent)  # of the unsent, how many lie in the file
        self._is_closing, self._closes_at_s = False, float("inf")
        self._mlflow: MlflowClient | None = None
        self._lock: FileLock | None = None
        self._thread = threading.Thread(target=self._send_all, name="mlflow-metrics", daemon=True)
        if target is not None:
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues the metrics of one step; returns at once."""
        self._put({"metrics": dict(metrics), "step": step})

    def log_table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Queues rows that are added to the run's table `name`; returns at once."""
        self._put({"table": name, "columns": columns})

    def close(self) -> None:
        """Sends what is queued, at most for the target's patience; then what is left lies in the target's file."""
        if self._target is not None:
            self._closes_at_s = time.monotonic() + self._target.patience_s
            self._queue.put(None)
            self._thread.join()

    def __enter__(self) -> MetricStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, entry: dict[str, Any]) -> None:
        if self._target is not None:
            known = {"uri": self._target.uri, "run_id": self._target.run_id, "time_ms": int(time.time() * 1000)}
            self._queue.put({**known, **entry})

    def _send_all(self) -> None:
        waits, try_at_s = waits_s(), 0.0
        while not (self._is_closing and (not self._unsent or time.monotonic() >= self._closes_at_s)):
            is_idle = not self._unsent and not self._is_closing
            self._collect(None if is_idle else max(0.0, try_at_s - time.monotonic()))
            if not self._unsent or time.monotonic() < try_at_s:
                continue
            if self._send_unsent():
                waits, try_at_s = waits_s(), 0.0
            else:
                try_at_s = min(time.monotonic() + next(waits), self._closes_at_s)
        if self._lock is not None:
            self._lock.release()

    def _collect(self, timeout_s: float | None) -> None:
        """Takes what is queued, waiting at most so long for the first; it goes to the file at once while the store is away."""
        with contextlib.suppress(queue.Empty):
            entry = self._queue.get(timeout=timeout_s)
            while True:
                if entry is None:
                    self._is_closing = True
                else:
                    self._unsent.append(entry)
                if self._num_kept:
                    self._keep()
                entry = self._queue.get_nowait()

    def _send_unsent(self) -> bool:
        """Whether all could be sent; else they are in the file."""
        assert self._target is not None
        while self._unsent:
            try:
                self._mlflow = self._mlflow or client(self._target.uri)
                _send(self._mlflow, self._unsent[0])
            except Exception as error:  # a process edge: figures must never stop a training run
                if will_pass(error):
                    self._warn_once(error)
                    self._keep()
                    return False
                log.warning("figures were refused: %s: %s", type(error).__name__, error)
            self._unsent.pop(0)
            self._num_kept = max(0, self._num_kept - 1)
        if self._target.unsent_file is not None:
            self._target.unsent_file.unlink(missing_ok=True)
        return True

    def _warn_once(self, error: Exception) -> None:
        assert self._target is not None
        if self._num_kept == 0:
            place = self._target.unsent_file or "memory, and are lost if it stays away"
            log.warning("the MLflow store is away (%s); figures wait in %s", error, place)

    def _keep(self) -> None:
        """Appends to the file what of the unsent is not in it yet."""
        assert self._target is not None
        if self._target.unsent_file is not None and self._num_kept < len(self._unsent):
            self._target.unsent_file.parent.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = _lock(self._target.unsent_file, timeout_s=-1)
                self._lock.acquire()
            with self._target.unsent_file.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(entry) + "\n" for entry in self._unsent[self._num_kept :])
        self._num_kept = len(self._unsent)
