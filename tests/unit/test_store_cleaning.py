"""Plain files leave the store some time after the last order that names them, and no sooner; in a folder and in a bucket."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from infra import orders
from infra.artifact_store import UNUSED_S, ArtifactStore, open_store
from infra.orders import Order, Result
from infra.places import Place
from infra.store_cleaning import clean_files


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture
def folder_store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


def pushed(store: ArtifactStore, path: Path, text: str) -> str:
    path.write_text(text)
    return store.push_file(path)


def make_old(store: ArtifactStore, sha256: str, age_s: float = 2 * UNUSED_S) -> None:
    """As if it had been pushed so long ago; of a store in a folder."""
    os.utime(Path(store.place.url.removeprefix("file://")) / "files" / sha256, (time.time() - age_s,) * 2)


def test_files_that_no_order_and_no_result_names_are_removed_and_others_stay(store: ArtifactStore, tmp_path: Path) -> None:
    names = ("unused", "of an order", "of a result", "of an estimate")
    unused, *used = [pushed(store, tmp_path / "file", text) for text in names]
    orders.write(store, "staging/train-1/config.json", Order(module="m", job={}, files={"a/rows.jsonl": used[0]}))
    orders.write(store, "staging/train-1/config.result.json", Result(exit_code=1, files={"runs/x/unsent.jsonl": used[1]}))
    orders.write(store, "runs/today/config-estimate-training-estimate.json", Order(module="m", job={}, files={"rows": used[2]}))
    assert clean_files(store) == []
    assert clean_files(store, unused_s=-1) == [unused]
    assert store.place.names("files") == sorted(used)
    assert clean_files(store, unused_s=-1) == []


def test_files_of_a_step_that_is_over_are_removed_when_they_are_old(folder_store: ArtifactStore, tmp_path: Path) -> None:
    old, young = (pushed(folder_store, tmp_path / "file", text) for text in ("old", "young"))
    make_old(folder_store, old)
    make_old(folder_store, young, UNUSED_S - 60)
    orders.write(folder_store, "staging/rows-1/config.json", Order(module="m", job={}, files={"a": old, "b": young}))
    assert clean_files(folder_store) == []
    folder_store.place.remove("staging/rows-1")  # as the runner does once the step's output is there
    assert clean_files(folder_store) == [old]
    assert folder_store.place.names("files") == [young]


def test_file_that_a_run_beside_pushes_again_stays_before_its_order_is_written(folder_store: ArtifactStore, tmp_path: Path) -> None:
    """It was there already, old and unused: what it is pushed for is not known before the order is."""
    first = pushed(folder_store, tmp_path / "rows.jsonl", "rows")
    make_old(folder_store, first)
    assert pushed(folder_store, tmp_path / "rows.jsonl", "rows") == first
    assert clean_files(folder_store) == []
    folder_store.fetch_file(first, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").read_text() == "rows"


class Busy(Place):
    """A place where another driver pushes its file as soon as somebody has read the names of the orders."""

    others_file: Path

    def names(self, prefix: str) -> list[str]:
        found = super().names(prefix)
        if prefix == "runs":
            ArtifactStore(Place(self.url)).push_file(self.others_file)
        return found


def test_file_pushed_again_while_others_are_looked_at_stays(folder_store: ArtifactStore, tmp_path: Path) -> None:
    """The names of the files and the orders were read before; its age is asked for last."""
    make_old(folder_store, pushed(folder_store, tmp_path / "rows.jsonl", "rows"))
    busy = Busy(folder_store.place.url)
    busy.others_file = tmp_path / "rows.jsonl"
    assert clean_files(ArtifactStore(busy)) == []
    assert len(folder_store.place.names("files")) == 1


def test_clock_of_whoever_cleans_decides_nothing(folder_store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(folder_store, tmp_path / "file", "pushed a moment ago by a driver whose order is still to come")
    days_ahead = time.time() + 9 * UNUSED_S
    monkeypatch.setattr(time, "time", lambda: days_ahead)
    assert clean_files(folder_store) == []


def test_order_of_another_version_keeps_its_files(folder_store: ArtifactStore, tmp_path: Path) -> None:
    sha256 = pushed(folder_store, tmp_path / "file", "text")
    make_old(folder_store, sha256)
    folder_store.place.write("staging/train-1/order.json", f'{{"version": 9, "inputs": [["a", "{sha256}"]]}}'.encode())
    assert clean_files(folder_store) == []
