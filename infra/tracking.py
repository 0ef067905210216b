"""MLflow runs: the driver makes them, workers are given an id, rank 0 logs to it.

- One parent run a `slipway run`, one nested run a step; a worker never makes a run (mlflow issues 11782, 5817).
- The local store is sqlite by absolute path with a write-ahead log, so that a reader never waits for a writer; MLflow itself waits 20 s for
  another writer. Never the file store (mlflow issue 23525).
- Starting must work or the run stops; a metric that cannot be logged later waits on this machine's disk (metric_stream.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from filelock import FileLock

from infra.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARS = 6000  # MLflow's own limit for one parameter's value
MAX_DIGEST_CHARS = 36  # and for a dataset's digest
SQLITE = "sqlite:///"
LOCAL_SCHEMES = ("", "file")
log = logging.getLogger(__name__)


def client(uri: str) -> MlflowClient:
    """A client for the store at `uri`; the import takes two seconds, so it happens here."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by mlflow while it is imported
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where --json writes its one object
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets its own level
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    file = Path(uri.removeprefix(SQLITE))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(file.name + ".lock")):  # two that make the tables at once would trip over each other
        with contextlib.closing(sqlite3.connect(file)) as store:
            store.execute("PRAGMA journal_mode=WAL")  # stays with the file
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_shared(mlflow: MlflowClient, uri: str, run_id: str) -> bool:
    """Whether the run's files are to be reached from other machines: the store is a server, or keeps them elsewhere than on a disk here."""
    is_server = urlparse(uri).scheme in ("http", "https")
    return is_server or urlparse(mlflow.get_run(run_id).info.artifact_uri).scheme not in LOCAL_SCHEMES


def ensure_experiment(mlflow: MlflowClient, name: str, artifact_root: str | Path | None) -> str:
    """The id of the experiment `name`, made when absent; `artifact_root` is where its runs' files go, absent where the server knows.

    Raises TransientError when the store does not answer, ConfigError when it does not let us in.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = artifact_root.absolute().as_uri() if isinstance(artifact_root, Path) else artifact_root
        return str(mlflow.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403) or "status: 401" in str(error):
            raise ConfigError(
                f"the MLflow server does not let us in: {error}. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account "
                "that may make experiments."
            ) from error
        raise TransientError(f"the MLflow store does not answer: {error}. Check MLFLOW_TRACKING_URI, then run again.") from error


def start_run(
    mlflow: MlflowClient, experiment_id: str, name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """The id of a new run, nested below `parent_run_id` where given."""
    all_tags = dict(tags or {})
    if parent_run_id:
        all_tags[PARENT_TAG] = parent_run_id
    return str(mlflow.create_run(experiment_id, run_name=name, tags=all_tags).info.run_id)


def find_run(mlflow: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> str | None:
    """The id of the newest run of that name and with these tags, or None."""
    wanted = [f"attributes.run_name = '{name}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
    found = mlflow.search_runs([experiment_id], " and ".join(wanted), max_results=1)
    return str(found[0].info.run_id) if found else None


def log_params(mlflow: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """Every leaf of a nested config as one parameter with a dotted name."""
    from mlflow.entities import Param

    params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in _leaves(config)]
    for start in range(0, len(params), 100):  # 100 parameters a request is MLflow's limit
        mlflow.log_batch(run_id, params=params[start : start + 100])


def log_metrics(mlflow: MlflowClient, run_id: str, metrics: Mapping[str, float], step: int = 0, time_ms: int | None = None) -> None:
    """Several metrics at one step, in one request; the same ones with the same time again change nothing."""
    from mlflow.entities import Metric

    time_ms = int(time.time() * 1000) if time_ms is None else time_ms
    mlflow.log_batch(run_id, metrics=[Metric(key, float(value), time_ms, step) for key, value in metrics.items()])


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


@contextlib.contextmanager
def run(
    mlflow: MlflowClient,
    experiment_id: str,
    name: str,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    begun_run_id: str | None = None,
) -> Iterator[str]:
    """A run, nested where a parent is given, that ends FINISHED, KILLED on Ctrl-C, or FAILED with the error as a tag.

    It is the one that was begun before where that is named and still there.
    """
    run_id = _taken_up(mlflow, begun_run_id) or start_run(mlflow, experiment_id, name, parent_run_id, tags)
    try:
        yield run_id
    except BaseException as error:
        with _only_warns(f"run {run_id} is not marked as ended"):
            mlflow.set_tag(run_id, "slipway.error", str(error)[:MAX_PARAM_CHARS])
            mlflow.set_terminated(run_id, status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    mlflow.set_terminated(run_id)


def end_left(mlflow: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Ends a run as FINISHED, with these tags, that a driver which was killed has left running; one that has ended stays as it is."""
    found = _live(mlflow, run_id)
    if found is None or found.info.status != "RUNNING":
        return
    for name, value in tags.items():
        mlflow.set_tag(run_id, name, value)
    mlflow.set_terminated(run_id)


def _taken_up(mlflow: MlflowClient, run_id: str | None) -> str | None:
    """The run, running again; None where the store has it no more, or only as a deleted one."""
    if run_id is None or _live(mlflow, run_id) is None:
        return None
    mlflow.update_run(run_id, status="RUNNING")
    return run_id


def _live(mlflow: MlflowClient, run_id: str) -> Run | None:
    """The run; None where the store has it no more, or only as a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


@contextlib.contextmanager
def _only_warns(consequence: str) -> Iterator[None]:
    """A store that is away must not hide the error that a run ends by."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        log.warning("%s: %s", consequence, error)
