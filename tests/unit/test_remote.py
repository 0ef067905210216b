"""A job sent through a store and run in another home, as on another machine: real programs, no cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra import orders, remote
from infra.artifact_store import ArtifactStore, open_store
from infra.contracts import read_manifest, verify, write_manifest
from infra.errors import ArtifactError, ConfigError, SlipwayError, TransientError
from infra.process import Job, TrackingTarget
from infra.provenance import Provenance
from infra.store_cleaning import clean_files
from pipelines.executors.shipping import Shipment
from serving.config import PredictJob, ServeConfig
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
        (job.output_dir.parent / "pid").write_text(str(os.getpid()))
        (job.output_dir.parent / "started").touch()
        time.sleep(60)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    text = (job.base_dir / "text").read_text() + (job.note.read_text() if job.note else "")
    (job.output_dir / "text").write_text(text + "c")
    if job.tracking:
        job.tracking.unsent_file.parent.mkdir(parents=True, exist_ok=True)
        job.tracking.unsent_file.write_text("figure")
    if job.does == "weigh":
        (job.output_dir / "w.safetensors").write_text("weights")
    if job.does in ("write", "weigh"):
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


def test_weights_that_were_made_elsewhere_stay_in_the_store(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home, does="weigh"))
    shipment.send()
    assert run_elsewhere(shipment, tmp_path / "node/home") == 0
    shipment.collect()
    output = home / "staging/merge-2/output"
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "text"]
    assert (store.fetch("merge-2", tmp_path / "server/artifacts") / "w.safetensors").read_text() == "weights"


def test_files_of_a_job_stay_in_the_store_until_its_step_is_over(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    """However old they are: it may have waited in a queue for days. Another run cleans at each moment."""
    note, files = home / "staging/merge-2/note.txt", tmp_path / "store" / "files"
    note.parent.mkdir(parents=True)
    note.write_text("n")

    def cleaned_by_another() -> list[str]:
        for path in files.glob("*"):
            os.utime(path, (0, 0))
        return clean_files(store)

    shipment = Shipment(store, home, "program_under_test", job(home, note=note, does="write no manifest"))
    shipment.send()
    assert cleaned_by_another() == []
    assert run_elsewhere(shipment, tmp_path / "node/home") == 0
    assert cleaned_by_another() == []
    shipment.collect()
    assert (home / "staging/merge-2/output/text").read_text() == "anc"
    store.place.remove("staging/merge-2")  # as the runner does after a step
    assert len(cleaned_by_another()) >= 2
    assert list(files.glob("*")) == []


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


def test_order_that_was_done_is_not_run_again_and_one_sent_again_is(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home))
    shipment.send()
    assert run_elsewhere(shipment, tmp_path / "other/home") == 0
    assert shipment.is_done()
    assert run_elsewhere(shipment, tmp_path / "third/home") == 0
    assert not (tmp_path / "third/home/staging").exists()
    shipment.send()
    assert not shipment.is_done()
    assert run_elsewhere(shipment, tmp_path / "third/home") == 0
    assert (tmp_path / "third/home/staging/merge-2/config.json").is_file()
    assert not (tmp_path / "third/home/staging/merge-2/output").exists()  # it is in the store now


def test_result_whose_artifact_was_removed_from_the_store_does_not_count(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home))
    shipment.send()
    run_elsewhere(shipment, tmp_path / "other/home")
    store.place.remove("artifacts/merge-2")
    assert not shipment.is_done()


def test_program_told_to_stop_elsewhere_leaves_no_result_and_nothing_running(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home, does="wait"))
    shipment.send()
    other = tmp_path / "other/home"
    environment = {**os.environ, "SLIPWAY_HOME": str(other)}
    with subprocess.Popen([sys.executable, *shipment.command[1:]], env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(other / "staging/merge-2/started")
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=30)[0]
    assert not psutil.pid_exists(int((other / "staging/merge-2/pid").read_text()))
    assert process.returncode == 130
    assert "working in" in printed
    assert shipment.result() is None
    with pytest.raises(TransientError, match="machine was lost"):
        shipment.collect()


def test_input_that_is_damaged_in_the_store_is_named_here(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home))
    shipment.send()
    (tmp_path / "store/artifacts/base-1/text").write_text("z")
    with pytest.raises(ArtifactError, match="sha256"):
        run_elsewhere(shipment, tmp_path / "other/home")
    assert not (tmp_path / "other/home/artifacts/base-1").exists()
    with pytest.raises(ArtifactError, match="sha256"):
        shipment.collect()


def test_order_that_leads_out_of_the_home_is_refused(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    shipment = Shipment(store, home, "program_under_test", job(home))
    shipment.send()
    file = tmp_path / "store" / shipment.order
    file.write_text(file.read_text().replace("slipway-home:staging/merge-2/output", "slipway-home:../../elsewhere"))
    with pytest.raises(ArtifactError, match="outside of SLIPWAY_HOME"):
        run_elsewhere(shipment, tmp_path / "other/home")


def test_rows_and_models_of_the_driver_s_machine_travel_with_the_job(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "rows.jsonl").write_text("row")
    (mine / "model/config.json").write_text("{}")
    folder = home / "staging/rows-1"
    sources = (DataSource(path=str(mine / "rows.jsonl")),)
    jobs = [RowsJob(output_dir=folder / "output", train=sources), BaseJob(output_dir=folder / "output", source=f"file:{mine / 'model'}")]
    for each in jobs:
        shipment = Shipment(store, home, "training.any", each)
        shipment.send()
        order = orders.read(store, shipment.order, orders.Order)
        assert order is not None
        found = type(each).model_validate(orders.arrive(store, order, tmp_path / "other"))
        place = Path(found.train[0].path if isinstance(found, RowsJob) else found.source.removeprefix("file:"))  # type: ignore[attr-defined]
        assert place.is_relative_to(tmp_path / "other/inputs")
        assert (place.read_text() if place.is_file() else (place / "config.json").read_text()) == ("row" if place.is_file() else "{}")


def test_programs_of_one_step_have_names_and_orders_of_their_own(store: ArtifactStore, home: Path) -> None:
    output = home / "staging/prove-3/output"
    programs = [("train", output), ("score", output / "training"), ("score", output / "int8"), ("ask", output / "int8")]
    shipments = [Shipment(store, home, module, Job(output_dir=folder)) for module, folder in programs]
    names = ["slipway-prove-3", "slipway-prove-3-training-score", "slipway-prove-3-int8-score", "slipway-prove-3-int8-ask"]
    assert [each.name for each in shipments] == names
    assert len({each.order for each in shipments}) == len(programs)


def test_interpreter_of_the_driver_s_machine_is_left_out_of_the_order(store: ArtifactStore, home: Path, tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    serve = ServeConfig(engine="vllm", engine_python=tmp_path / "python")
    base = home / "artifacts/base-1"
    ours = PredictJob(output_dir=home / "staging/predict-1/output", model_dir=base, tokens_dir=base, serve=serve)
    shipment = Shipment(store, home, "serving.predict", ours)
    shipment.send()
    order = orders.read(store, shipment.order, orders.Order)
    assert order is not None
    found = PredictJob.model_validate(orders.arrive(store, order, tmp_path / "other"))
    assert (found.serve.engine, found.serve.engine_python) == ("vllm", None)
    assert order.files == {}
