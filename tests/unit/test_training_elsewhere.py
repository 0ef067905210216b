"""A training worker in the home of another node: what it reads, and how what it makes and says reaches the program that started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra import mirror
from infra.artifact_store import ArtifactStore, open_store
from infra.contracts import write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.process import Progress, Remote
from infra.provenance import Provenance
from pipelines.executors.shipping import Shipment
from tests.conftest import wait_for
from training import elsewhere
from training.config import FinetuneJob
from training.folders import checkpoints_folder

NOTHING: Callable[[FinetuneJob], None] = lambda job: None  # noqa: E731


@dataclass
class Begun:
    """A program that has begun on its node, and what it tells its workers."""

    job: FinetuneJob
    config: dict[str, Any]
    store: ArtifactStore


@pytest.fixture
def begun(tmp_path: Path) -> Begun:
    """The job as infra.remote gives it to the program."""
    home = tmp_path / "driver"
    for name in ("base-1", "render-1"):
        folder = home / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "text").write_text(name)
        write_manifest(folder, "base", Provenance())
    slot = home / "staging/train-1"
    fields = {"output_dir": slot / "output", "progress_file": slot / "progress.jsonl"}
    job = FinetuneJob(base_dir=home / "artifacts/base-1", tokens_dir=home / "artifacts/render-1", **fields)  # type: ignore[arg-type]
    store = open_store((tmp_path / "store").as_uri())
    shipment = Shipment(store, home, "training.finetune", job)
    shipment.send()
    job = elsewhere.settled(job.model_copy(update={"remote": Remote(store=store.place.url, order=shipment.order)}))
    job.output_dir.mkdir(parents=True)
    return Begun(job, elsewhere.begin(job), store)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process one of another node; that node's home."""
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "node"))
    monkeypatch.setattr(mirror, "SYNC_S", 0.02)
    return tmp_path / "node"


def train(job: FinetuneJob) -> None:
    """What rank 0 does, as far as files go."""
    Progress(job.progress_file, "steps").report(1, 2)
    read = (job.base_dir / "text").read_text() + (job.tokens_dir / "text").read_text()
    (job.output_dir / "adapter").write_text(read)


def fail(job: FinetuneJob) -> None:
    raise ConfigError("step 1: the loss is nan")


def test_output_of_rank_0_on_another_node_comes_to_the_program(begun: Begun, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere.work(begun.config, 0, train)
    assert not (begun.job.output_dir / "adapter").exists()
    assert begun.store.place.exists("staging/train-1/config.progress.jsonl")
    monkeypatch.setenv("SLIPWAY_HOME", str(node.with_name("driver")))
    elsewhere.bring(begun.job)
    assert (begun.job.output_dir / "adapter").read_text() == "base-1render-1"
    assert not (node / "staging/train-1/output").exists()


def test_other_ranks_on_another_node_send_nothing(begun: Begun, node: Path) -> None:
    elsewhere.work(begun.config, 1, NOTHING)
    assert not begun.store.place.exists("staging/train-1/config.worker.json")


def test_worker_on_the_program_s_own_disk_uses_its_folders(begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "driver"))
    elsewhere.work(begun.config, 0, train)
    assert (begun.job.output_dir / "adapter").read_text() == "base-1render-1"
    assert not begun.store.place.exists("staging/train-1/config.worker.json")


@pytest.mark.parametrize("home", ["driver", "node"])
def test_known_error_of_any_worker_is_the_program_s(begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / home))
    assert elsewhere.failure(begun.job) is None
    elsewhere.work(begun.config, 1, fail)
    error = elsewhere.failure(begun.job)
    assert isinstance(error, ConfigError)
    assert "the loss is nan" in error.message


def test_input_that_is_damaged_in_the_store_is_the_program_s_error(begun: Begun, node: Path) -> None:
    begun.store.place.write("artifacts/base-1/text", b"BASE-1")
    elsewhere.work(begun.config, 0, train)
    error = elsewhere.failure(begun.job)
    assert isinstance(error, ArtifactError)
    assert "sha256" in error.message


def test_word_to_stop_reaches_rank_0_on_another_node_and_not_the_next_attempt(begun: Begun, node: Path) -> None:
    def stop(job: FinetuneJob) -> None:
        file = checkpoints_folder(job.output_dir) / elsewhere.STOP_NAME
        assert not file.exists()
        elsewhere.stop_workers(begun.job)
        wait_for(file)

    elsewhere.work(begun.config, 0, stop)
    begun.store.place.remove("staging/train-1/config.stop")  # as infra.remote does before it runs the order again
    elsewhere.work(begun.config, 0, stop)


def test_checkpoints_go_to_the_store_unless_they_have_a_place(begun: Begun) -> None:
    assert begun.job.train.checkpoint_url == f"{begun.store.place.url}/staging/train-1/checkpoints"
    chosen = begun.job.model_copy(update={"train": begun.job.train.model_copy(update={"checkpoint_url": "s3://mine"})})
    assert elsewhere.settled(chosen).train.checkpoint_url == "s3://mine"
    alone = begun.job.model_copy(update={"remote": None, "train": begun.job.train.model_copy(update={"checkpoint_url": None})})
    assert elsewhere.settled(alone) == alone
