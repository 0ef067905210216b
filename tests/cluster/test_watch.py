"""Watches of the driver's client over cut connections, expired histories and servers that are away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.errors import ConfigError, TransientError
from pipelines.cluster.client import Cluster
from pipelines.cluster.refs import Ref, ref_of
from pipelines.cluster.watch import Event, watch, watch_one
from tests.cluster.faults import Fault, gone
from tests.cluster.samples import config_map
from tests.cluster.server import Server

IDLE_S = 0.05
TIMEOUT_S = 10.0
AWAY = Fault(503, "ServiceUnavailable", "the server is currently unable to handle the request")


def next_events(stream: Iterator[Event | None], number: int) -> list[tuple[str, str]]:
    """The next events, as state and the value `a` of each object's data."""
    found: list[tuple[str, str]] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(found) < number:
        event = next(stream)
        if event is not None:
            found.append((event.state, event.live["data"]["a"]))
        assert time.monotonic() < deadline_s, f"only {found} came"
    return found


def end_of(stream: Iterator[Any]) -> None:
    """Reads to the end, where nothing more comes."""
    deadline_s = time.monotonic() + TIMEOUT_S
    for item in stream:
        assert item is None, item
        assert time.monotonic() < deadline_s, "it does not end"


def quiet(stream: Iterator[Any], ticks: int = 6) -> bool:
    """Whether nothing comes for some ticks."""
    return [item for item in (next(stream) for _ in range(ticks)) if item is not None] == []


@pytest.fixture
def change(cluster: Cluster) -> Callable[[dict[str, Any], str], None]:
    """Sets the value `a` of an object, by a client of its own, as somebody else would."""

    def to(made: dict[str, Any], value: str) -> None:
        cluster.merge(ref_of(made), {"data": {"a": value}})

    return to


Change = Callable[[dict[str, Any], str], None]


def test_watch_tells_what_is_there_then_changes_then_the_end(cluster: Cluster, change: Change) -> None:
    made = config_map(labels={"mine": "yes"})
    cluster.create(made)
    cluster.create(config_map())
    stream = watch(cluster, "v1", "ConfigMap", labels={"mine": "yes"}, idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    change(made, "2")
    assert next_events(stream, 1) == [("present", "2")]
    cluster.delete(ref_of(made))
    assert next_events(stream, 1) == [("gone", "2")]
    assert quiet(stream)


def test_watch_of_an_object_that_is_not_there_yet_begins_with_its_creation(cluster: Cluster) -> None:
    made = config_map()
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert quiet(stream, 3)
    cluster.create(config_map())
    cluster.create(made)
    assert next_events(stream, 1) == [("present", "1")]


def test_watch_over_cut_connections_misses_nothing_and_tells_nothing_twice(server: Server, cluster: Cluster, change: Change) -> None:
    made = config_map()
    cluster.create(made)
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    for value in ("2", "3", "4"):
        server.cut()
        change(made, value)
        assert next_events(stream, 1) == [("present", value)]
    assert quiet(stream)


def test_watch_whose_history_is_gone_compares_with_what_it_knew(server: Server, cluster: Cluster, change: Change) -> None:
    first, second, third = (config_map({"a": each}, labels={"mine": "yes"}) for each in ("x", "y", "z"))
    for made in (first, second, third):
        cluster.create(made)
    stream = watch(cluster, "v1", "ConfigMap", labels={"mine": "yes"}, idle_s=IDLE_S)
    assert sorted(next_events(stream, 3)) == [("present", "x"), ("present", "y"), ("present", "z")]
    server.cut()  # what follows happens while nobody watches, and is forgotten before the watch is opened again
    change(first, "x2")
    cluster.delete(ref_of(second))
    server.compact()
    assert sorted(next_events(stream, 2)) == [("gone", "y"), ("present", "x2")]
    assert quiet(stream)
    change(third, "z2")
    assert next_events(stream, 1) == [("present", "z2")]


def test_watch_that_is_refused_as_gone_reads_the_state_anew(server: Server, cluster: Cluster) -> None:
    made = config_map()
    cluster.create(made)
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    server.fail_next(gone())
    server.cut()
    assert quiet(stream)
    after = server.log[[line.endswith(" 410") for line in server.log].index(True) + 1 :]
    assert "watch=true" not in after[0]


def test_object_that_was_made_anew_under_its_name_is_gone_and_present(server: Server, cluster: Cluster) -> None:
    made = config_map()
    cluster.create(made)
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    server.cut()
    cluster.delete(ref_of(made))
    cluster.create({**made, "data": {"a": "new"}})
    server.compact()
    assert next_events(stream, 2) == [("gone", "1"), ("present", "new")]


def test_watch_goes_on_when_the_server_is_back_and_ticks_meanwhile(server: Server, cluster: Cluster, change: Change) -> None:
    made = config_map()
    cluster.create(made)
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    change(made, "2")
    assert next_events(stream, 1) == [("present", "2")]
    server.fail_next(AWAY)
    server.cut()
    assert quiet(stream)
    change(made, "3")
    assert next_events(stream, 1) == [("present", "3")]


def test_watch_of_a_server_that_stays_away_gives_a_transient_error(server: Server, cluster: Cluster) -> None:
    made = config_map()
    cluster.create(made)
    cluster.patience_s = 0.3
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    server.fail_next(*[AWAY] * 9)
    server.cut()
    with pytest.raises(TransientError, match="watch ConfigMap"):
        end_of(stream)


def test_watch_that_may_not_be_gives_a_config_error(server: Server, cluster: Cluster) -> None:
    made = config_map()
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert quiet(stream, 2)
    server.fail_next(Fault(403, "Forbidden", "no watching here"))
    server.cut()
    with pytest.raises(ConfigError, match="no watching here"):
        end_of(stream)


def test_watch_on_a_connection_that_went_silent_is_opened_again(
    server: Server, cluster: Cluster, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.cluster.watch.SILENCE_S", 0.2)
    server.bookmark_s = 60.0
    made = config_map()
    cluster.create(made)
    stream = watch_one(cluster, ref_of(made), idle_s=IDLE_S)
    assert next_events(stream, 1) == [("present", "1")]
    deadline_s = time.monotonic() + TIMEOUT_S
    while sum("watch=true" in line for line in server.log) < 2:
        assert next(stream) is None
        assert time.monotonic() < deadline_s, "the watch is not opened again"
    change(made, "2")
    assert next_events(stream, 1) == [("present", "2")]


def test_watch_that_is_closed_leaves_no_thread(cluster: Cluster) -> None:
    before = set(threading.enumerate())
    stream = watch_one(cluster, Ref("v1", "ConfigMap", "x"), idle_s=IDLE_S)
    assert quiet(stream, 2)
    (reader,) = [thread for thread in threading.enumerate() if thread.name == "cluster-stream" and thread not in before]
    stream.close()  # type: ignore[attr-defined]
    assert not reader.is_alive()
