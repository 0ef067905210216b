"""A job sent through a store and run in another home, as on another machine: real programs, no cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from infra import remote
from infra.artifact_store import ArtifactStore, open_store
from infra.contracts import read_manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError, SlipwayError, TransientError
from infra.process import Job, TrackingTarget
from infra.provenance import Provenance
from pipelines.executors.shipping import Shipment
from tests.conftest import wait_for
from training.config import BaseJob, DataSource, RowsJob

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from infra.config import Config
from infra.contracts import verify, write_manifest
from infra.errors import ConfigError
from infra.process import Job, Progress, run_program

class TextJob(Job):
    base_dir: Path
    note: Path | None = None
    does: str = "write"

def main(job: TextJob) -> None:
    print("working in", job.output_dir)
    base = verify(job.base_dir)
    Progress(job.progress_file, "lines").report(1, 2, loss=0.5)
    if job.does == "fail":
        raise ConfigError("rows.jsonl:3: not JSON")
    if job.does == "crash":
        raise ZeroDivisionError("what a pity")
    if job.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.does == "wait":
        (job.output_dir.parent / "started").touch()
        time.sleep(60)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    text = (job.base_dir / "text").read_text() + (job.note.read_text() if job.note else "")
    (job.output_dir / "text").write_text(text + "c")
    if job.tracking:
        job.tracking.unsent_file.parent.mkdir(parents=True, exist_ok=True)
        job.tracking.unsent_file.write_text("figure")
    if job.does == "write":
        write_manifest(job.output_dir, "merged", job.provenance, parents={"base": base.digest})

if __name__ == "__main__":
    run_program(TextJob, main)
"""


class TextJob(Job):
    """The job of the program above."""

    base_dir: Path
    note: Path | None = None
    does: str = "write"


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program_under_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The driver's home, with one artifact."""
    folder = tmp_path / "driver/home"
    base = folder / "artifacts/base-1"
    base.mkdir(parents=True)
    (base / "text").write_text("a")
    write_manifest(base, "base", Provenance())
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store((tmp_path / "store").as_uri())


def job(home: Path, **fields: object) -> TextJob:
    slot = home / "staging/merge-2"
    return TextJob(output_dir=slot / "output", progress_file=slot / "progress.jsonl", base_dir=home / "artifacts/base-1", **fields)  # type: ignore[arg-type]


def run_elsewhere(shipment: Shipment, home: Path) -> int:
    """Does what the other machine does, in this process; the program is one of its own."""
    return remote.run_order(shipment.store, shipment.order, shipment.module, home)


def test_output_of_a_program_elsewhere_is_the_artifact_of_a_program_here(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    (home / "staging/merge-2").mkdir(parents=True)
    note = home / "staging/merge-2/note.txt"
    note.write_text("b")
    target = TrackingTarget(uri="http://mlflow", run_id="1", unsent_file=home / "runs/now/unsent/merge.jsonl")
    ours = job(home, note=note, tracking=target)
    shipment = Shipment(store, home, "program_under_test", ours)
    assert (shipment.name, shipment.is_done()) == ("slipway-merge-2", False)
    shipment.send()
    assert str(home) not in (tmp_path / "store" / shipment.order).read_text()
    assert run_elsewhere(shipment, tmp_path / "other/home") == 0
    shipment.follow()
    shipment.collect()
    assert (ours.output_dir / "text").read_text() == "abc"
    made = verify(ours.output_dir, ("merged",))
    assert made.parents == {"base": read_manifest(home / "artifacts/base-1").digest}
    assert ours.progress_file is not None
    assert json.loads(ours.progress_file.read_text().splitlines()[-1])["loss"] == 0.5
    assert target.unsent_file is not None
    assert target.unsent_file.read_text() == "figure"
    assert store.find(made.digest) == "merge-2"


@pytest.mark.parametrize(
    ("does", "error", "text"),
    [("fail", ConfigError, r"rows\.jsonl:3"), ("crash", SlipwayError, "what a pity"), ("die", TransientError, "signal 9")],
)
def test_program_elsewhere_that_fails_raises_here_what_it_raised_there(
    store: ArtifactStore, home: Path, tmp_path: Path, does: str, error: type[SlipwayError], text: str
) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home, does=does))
    shipment.send()
    assert run_elsewhere(shipment, tmp_path / "other/home") != 0
    assert not shipment.is_done()
    with pytest.raises(error, match=text) as raised:
        shipment.collect()
    assert type(raised.value) is error
