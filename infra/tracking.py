"""MLflow runs: the driver makes them, workers are given an id, rank 0 logs to it.

- One parent run a `slipway run`, one nested run a step; a worker never makes a run (mlflow issues 11782, 5817).
- The local store is sqlite by absolute path, one writer at a time in practice, never the file store (mlflow issue 23525).
- Starting must work or the run stops; a metric that cannot be logged later only warns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import TransientError
from infra.process import TrackingTarget

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARS = 6000  # MLflow's own limit for one parameter's value
MAX_DIGEST_CHARS = 36  # and for a dataset's digest
log = logging.getLogger(__name__)


def client(uri: str) -> MlflowClient:
    """A client for the store at `uri`; the import takes two seconds, so it happens here."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by mlflow while it is imported
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets its own level
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(mlflow: MlflowClient, name: str, artifact_dir: Path | None) -> str:
    """The id of the experiment `name`, made when absent; `artifact_dir` is where a local store keeps its files.

    Raises TransientError when the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = artifact_dir.absolute().as_uri() if artifact_dir else None
        return str(mlflow.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        raise TransientError(f"the MLflow store does not answer: {error}. Check MLFLOW_TRACKING_URI, then run again.") from error


def start_run(
    mlflow: MlflowClient, experiment_id: str, name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """The id of a new run, nested below `parent_run_id` where given."""
    all_tags = dict(tags or {})
    if parent_run_id:
        all_tags[PARENT_TAG] = parent_run_id
    return str(mlflow.create_run(experiment_id, run_name=name, tags=all_tags).info.run_id)


def log_params(mlflow: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """Every leaf of a nested config as one parameter with a dotted name."""
    from mlflow.entities import Param

    params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in _leaves(config)]
    for start in range(0, len(params), 100):  # 100 parameters a request is MLflow's limit
        mlflow.log_batch(run_id, params=params[start : start + 100])


def log_metrics(mlflow: MlflowClient, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Several metrics at one step, in one request."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    mlflow.log_batch(run_id, metrics=[Metric(key, float(value), now_ms, step) for key, value in metrics.items()])


def log_dataset(mlflow: MlflowClient, run_id: str, name: str, digest: str, source: Path) -> None:
    """The dataset as an MLflow input of the run, by name, digest and place; its rows stay where they are."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:MAX_DIGEST_CHARS], source_type="local", source=json.dumps({"uri": source.as_uri()}))
    mlflow.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training")])])


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class MetricStream:
    """Sends a worker's metrics to its run from one background thread, so that a slow server never slows a step."""

    def __init__(self, target: TrackingTarget | None) -> None:
        self._target = target
        self._queue: queue.Queue[tuple[dict[str, Any], int | str] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="mlflow-metrics", daemon=True)
        if target is not None:
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues the metrics of one step; returns at once."""
        if self._target is not None:
            self._queue.put((dict(metrics), step))

    def log_table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Queues rows that are added to the run's table `name`; returns at once."""
        if self._target is not None:
            self._queue.put((columns, name))

    def close(self, timeout_s: float = 30.0) -> None:
        """Sends what is queued, at most for `timeout_s`."""
        if self._target is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def __enter__(self) -> MetricStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_all(self) -> None:
        assert self._target is not None
        mlflow = None
        while (item := self._queue.get()) is not None:
            values, place = item
            try:
                mlflow = mlflow or client(self._target.uri)
                if isinstance(place, str):
                    mlflow.log_table(self._target.run_id, values, place)
                else:
                    log_metrics(mlflow, self._target.run_id, values, place)
            except Exception as error:  # a process edge: metrics must never stop a training run
                log.warning("figures for %s were not logged: %s: %s", place, type(error).__name__, error)


@contextlib.contextmanager
def run(
    mlflow: MlflowClient, experiment_id: str, name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A run, nested where a parent is given, that ends FINISHED, KILLED on Ctrl-C, or FAILED with the error as a tag."""
    run_id = start_run(mlflow, experiment_id, name, parent_run_id, tags)
    try:
        yield run_id
    except BaseException as error:
        mlflow.set_tag(run_id, "slipway.error", str(error)[:MAX_PARAM_CHARS])
        mlflow.set_terminated(run_id, status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    mlflow.set_terminated(run_id)
