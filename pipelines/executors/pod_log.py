"""Brings what pods print into a file of this machine while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.errors import SlipwayError
from pipelines.cluster.client import Cluster
from pipelines.cluster.logs import follow_logs
from pipelines.cluster.refs import Ref, ref_of

LOOK_S = 2.0
IDLE_S = 3
END_S = 10.0  # that the last lines have, once the program has ended


@contextmanager
def copied_log(cluster: Cluster, labels: Mapping[str, str], container: str, log_file: Path) -> Iterator[None]:
    """While the block runs, the lines of the container of every pod with the labels go into `log_file`, one pod after the other."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    reader = threading.Thread(target=_copy, args=(cluster, labels, container, log_file, ended), name="pod-log", daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join(END_S)


def _copy(cluster: Cluster, labels: Mapping[str, str], container: str, log_file: Path, ended: threading.Event) -> None:
    """Follows one pod after the other until `ended`, and then those that have come by then."""
    known: set[str] = set()
    while True:
        is_last_look = ended.is_set()
        try:
            for pod in _new_pods(cluster, labels, known):
                _copy_pod(cluster, pod, container, log_file, ended)
        except SlipwayError as error:  # a log that cannot be read must not end the job; its result tells how it went
            _append(log_file, f"(the log could not be read on: {error.message})")
        if is_last_look:
            return
        ended.wait(LOOK_S)


def _new_pods(cluster: Cluster, labels: Mapping[str, str], known: set[str]) -> list[Ref]:
    """The pods not seen before, the oldest first."""
    pods = sorted(cluster.find("v1", "Pod", labels), key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    new = [pod for pod in pods if pod["metadata"]["uid"] not in known]
    known |= {pod["metadata"]["uid"] for pod in new}
    return [ref_of(pod) for pod in new]


def _copy_pod(cluster: Cluster, pod: Ref, container: str, log_file: Path, ended: threading.Event) -> None:
    num_idle = 0
    with log_file.open("a", encoding="utf-8") as log:
        for line in follow_logs(cluster, pod, container):
            num_idle = num_idle + 1 if line is None and ended.is_set() else 0
            if line is not None:
                log.write(line + "\n")
                log.flush()
            elif num_idle > IDLE_S:  # its pod stays a while after the program has left its result
                return


def _append(log_file: Path, line: str) -> None:
    with log_file.open("a", encoding="utf-8") as log:
        log.write(line + "\n")
