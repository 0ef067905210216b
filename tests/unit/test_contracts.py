from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from infra.contracts import has_all_files, read_manifest, verify, write_manifest
from infra.errors import BY_NAME, ArtifactError
from infra.provenance import Provenance, capture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"\x00" * 64)
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, "merged", capture())
    return tmp_path


def test_verify_of_untouched_folder_returns_its_manifest(folder: Path) -> None:
    manifest = verify(folder, ("merged",))
    assert set(manifest.files) == {"weights/model.safetensors", "config.json"}


def test_verify_of_changed_file_names_it_and_both_digests(folder: Path) -> None:
    before = read_manifest(folder).files["config.json"].sha256
    (folder / "config.json").write_text("[]")
    with pytest.raises(ArtifactError) as caught:
        verify(folder)
    assert "config.json" in caught.value.message
    assert before in caught.value.message
    assert "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945" in caught.value.message  # sha256 of "[]"


def test_verify_of_missing_and_of_extra_file_is_refused(folder: Path) -> None:
    (folder / "extra.py").write_text("")
    with pytest.raises(ArtifactError, match=r"extra\.py"):
        verify(folder)
    (folder / "extra.py").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match="absent"):
        verify(folder)


def test_verify_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="'merged'"):
        verify(folder, ("adapter",))


def test_verify_of_a_path_outside_the_folder_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["files"]["../secret"] = {"sha256": "0" * 64, "size_bytes": 1}
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="outside"):
        verify(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}'])
def test_manifest_that_is_damaged_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pkl", "pytorch_model.pth"])
def test_manifest_is_not_written_over_a_file_that_could_hold_a_pickle(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match="safetensors"):
        write_manifest(tmp_path, "merged", Provenance())
    assert not (tmp_path / "manifest.json").exists()


def test_digest_depends_on_content_and_not_on_provenance(folder: Path, tmp_path: Path) -> None:
    first = read_manifest(folder)
    assert write_manifest(folder, "merged", Provenance(mlflow_run_id="other")).digest == first.digest
    assert write_manifest(folder, "base", Provenance()).digest != first.digest


def test_has_all_files_sees_a_truncated_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert has_all_files(folder, manifest)
    (folder / "weights" / "model.safetensors").write_bytes(b"\x00" * 63)
    assert not has_all_files(folder, manifest)


def test_every_error_survives_the_way_between_processes() -> None:
    for error in BY_NAME.values():
        again = pickle.loads(pickle.dumps(error("found, needed, do")))  # noqa: S301 - our own bytes, as Ray sends errors
        assert type(again) is error
        assert again.message == "found, needed, do"
