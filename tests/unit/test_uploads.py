"""Artifacts into a run and back, on a store of this machine; tests/integration/test_backends.py does it over the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import tracking, uploads
from infra.contracts import MANIFEST_NAME, Manifest, verify, write_manifest
from infra.errors import ArtifactError
from infra.provenance import Provenance

PART_BYTES = 100


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mlflow")
    client = tracking.client(f"sqlite:///{folder}/mlflow.db")
    return client, tracking.ensure_experiment(client, "tests", folder / "artifacts")


def uploaded(store: Any, folder: Path, sizes: dict[str, int]) -> tuple[str, Manifest]:
    """The run that holds an artifact of files of these sizes."""
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(number % 251 for number in range(size)))
    manifest = write_manifest(folder, "quantized", Provenance())
    run_id = tracking.start_run(*store, "run")
    uploads.upload(store[0], run_id, folder, folder.parent / "scratch", PART_BYTES)
    return run_id, manifest


def test_files_of_every_size_come_back_as_they_were(store: Any, tmp_path: Path) -> None:
    sizes = {"empty": 0, "a/part": 100, "a/more": 101, "a/b/three": 300, "many": 1234}
    run_id, manifest = uploaded(store, tmp_path / "made", sizes)
    parts = [Path(item.path).name for item in store[0].list_artifacts(run_id, "model/many.parts")]
    assert parts == [f"{number:06d}" for number in range(13)]
    folder = uploads.download(store[0], run_id, manifest.digest, tmp_path / "artifacts")
    assert verify(folder) == manifest
    assert {name: (folder / name).stat().st_size for name in sizes} == sizes
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_lies_beside_the_artifact_goes_with_it_and_may_come_later(store: Any, tmp_path: Path) -> None:
    run_id, _ = uploaded(store, tmp_path / "made", {"weights": 250})
    (tmp_path / "made" / "seal").mkdir()
    (tmp_path / "made" / "seal" / "signature.json").write_text("later")
    uploads.upload_beside(store[0], run_id, tmp_path / "made", tmp_path / "scratch")
    folder = uploads._fetch(store[0], run_id, tmp_path, 1.0)
    assert (folder / "seal" / "signature.json").read_text() == "later"
    assert (folder / "weights").stat().st_size == 250


def test_artifact_that_this_machine_has_is_not_fetched(store: Any, tmp_path: Path) -> None:
    run_id, manifest = uploaded(store, tmp_path / "artifacts" / "made", {"weights": 10})
    (tmp_path / "artifacts" / "broken").mkdir()
    (tmp_path / "artifacts" / "broken" / MANIFEST_NAME).write_text("{}")
    assert uploads.download(store[0], "no such run", manifest.digest, tmp_path / "artifacts") == tmp_path / "artifacts" / "made"
    (tmp_path / "artifacts" / "made" / "weights").unlink()
    assert uploads.download(store[0], run_id, manifest.digest, tmp_path / "artifacts").name == f"fetched-{manifest.digest[:16]}"


def test_manifest_that_names_a_file_elsewhere_is_refused_before_it_is_written(store: Any, tmp_path: Path) -> None:
    run_id, manifest = uploaded(store, tmp_path / "made", {"weights": 10})
    document = json.loads((tmp_path / "made" / MANIFEST_NAME).read_text())
    document["files"]["../../outside"] = document["files"]["weights"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    store[0].log_artifact(run_id, str(tmp_path / MANIFEST_NAME), uploads.PLACE)
    with pytest.raises(ArtifactError, match="outside"):
        uploads.download(store[0], run_id, manifest.digest, tmp_path / "artifacts")
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_artifact_that_is_another_than_the_registry_says_is_refused(store: Any, tmp_path: Path) -> None:
    run_id, manifest = uploaded(store, tmp_path / "made", {"weights": 10})
    with pytest.raises(ArtifactError, match=f"its artifact has digest {manifest.digest}, the registry says dead"):
        uploads.download(store[0], run_id, "dead", tmp_path / "artifacts")
    assert list((tmp_path / "artifacts").iterdir()) == []
