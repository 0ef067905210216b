"""Logs of pods that the driver's client follows over cut connections, and their last lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.errors import ConfigError
from pipelines.cluster.client import Cluster
from pipelines.cluster.logs import follow_logs, has_ended, last_lines
from pipelines.cluster.refs import Ref, ref_of
from tests.cluster.samples import pod
from tests.cluster.server import Server
from tests.cluster.test_watch import IDLE_S, TIMEOUT_S, end_of, quiet


def set_phase(cluster: Cluster, made: dict[str, Any], phase: str) -> None:
    """Plays the node."""
    cluster.merge(ref_of(made), {"status": {"phase": phase}}, subresource="status")


def next_lines(stream: Iterator[str | None], number: int) -> list[str]:
    """The next lines of a log."""
    found: list[str] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(found) < number:
        line = next(stream)
        if line is not None:
            found.append(line)
        assert time.monotonic() < deadline_s, f"only {found} came"
    return found


def test_log_is_followed_to_the_end_of_the_pod(server: Server, cluster: Cluster) -> None:
    made = pod()
    cluster.create(made)
    name = made["metadata"]["name"]
    set_phase(cluster, made, "Running")
    server.write_log("default", name, "one\n\ntwo")
    stream = follow_logs(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_lines(stream, 3) == ["one", "", "two"]
    server.write_log("default", name, "three")
    set_phase(cluster, made, "Succeeded")
    assert next_lines(stream, 1) == ["three"]
    end_of(stream)


def test_log_over_cut_connections_gives_each_line_once(server: Server, cluster: Cluster) -> None:
    made = pod()
    cluster.create(made)
    name = made["metadata"]["name"]
    set_phase(cluster, made, "Running")
    stream = follow_logs(cluster, ref_of(made), idle_s=IDLE_S)
    server.write_log("default", name, "a\nb\nb")  # three lines of one time
    assert next_lines(stream, 3) == ["a", "b", "b"]
    server.cut()
    server.write_log("default", name, "c")
    assert next_lines(stream, 1) == ["c"]
    server.cut()
    server.write_log("default", name, "d")
    set_phase(cluster, made, "Failed")
    assert next_lines(stream, 1) == ["d"]
    end_of(stream)
    assert "sinceTime=" in [line for line in server.log if "/log?" in line][-1]


def test_log_of_a_container_that_has_not_started_is_waited_for(server: Server, cluster: Cluster) -> None:
    made = pod()
    cluster.create(made)
    waiting = [
        {
            "name": "app",
            "state": {"waiting": {"reason": "ContainerCreating"}},
            "image": "",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
        }
    ]
    cluster.merge(ref_of(made), {"status": {"phase": "Pending", "containerStatuses": waiting}}, subresource="status")
    stream = follow_logs(cluster, ref_of(made), idle_s=IDLE_S)
    assert quiet(stream, 3)
    server.write_log("default", made["metadata"]["name"], "up")
    cluster.merge(ref_of(made), {"status": {"phase": "Succeeded", "containerStatuses": []}}, subresource="status")
    assert next_lines(stream, 1) == ["up"]
    end_of(stream)


def test_log_of_a_container_that_the_pod_lacks_gives_a_config_error(cluster: Cluster) -> None:
    made = pod()
    cluster.create(made)
    with pytest.raises(ConfigError, match="container none is not valid"):
        list(follow_logs(cluster, ref_of(made), "none", idle_s=IDLE_S))


def test_log_of_a_pod_that_is_gone_ends(server: Server, cluster: Cluster) -> None:
    made = pod()
    assert list(follow_logs(cluster, ref_of(made), idle_s=IDLE_S)) == []
    cluster.create(made)
    server.write_log("default", made["metadata"]["name"], "one")
    stream = follow_logs(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_lines(stream, 1) == ["one"]
    cluster.delete(ref_of(made))
    end_of(stream)


def test_last_lines_of_a_log_explain_and_never_fail(server: Server, cluster: Cluster) -> None:
    made = pod()
    cluster.create(made)
    server.write_log("default", made["metadata"]["name"], "one\ntwo\nthree")
    assert last_lines(cluster, ref_of(made), num_lines=2) == "two\nthree\n"
    assert last_lines(cluster, Ref("v1", "Pod", "absent")) == ""
    server.shutdown()
    server.server_close()
    assert last_lines(cluster, ref_of(made)) == ""


@pytest.mark.parametrize(
    ("status", "policy", "expected"),
    [
        ({"phase": "Succeeded"}, "Never", True),
        ({"phase": "Failed"}, "Always", True),
        ({"phase": "Running", "containerStatuses": [{"name": "app", "state": {"terminated": {}}}]}, "Never", True),
        ({"phase": "Running", "containerStatuses": [{"name": "app", "state": {"terminated": {}}}]}, "OnFailure", False),
        ({"phase": "Running", "containerStatuses": [{"name": "app", "state": {"running": {}}}]}, "Never", False),
        ({}, "Never", False),
    ],
)
def test_has_ended_is_true_only_where_nothing_starts_again(status: dict[str, Any], policy: str, expected: bool) -> None:
    assert has_ended({"status": status, "spec": {"restartPolicy": policy}}) is expected
    assert has_ended(None) is True
