"""Artifacts in a folder and in an S3-compatible bucket on loopback: what goes up comes down, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infra.artifact_store import ArtifactStore, open_store
from infra.child import REPOSITORY
from infra.contracts import Manifest, no_weights, verify, write_manifest
from infra.errors import ArtifactError, ConfigError, TransientError
from infra.provenance import Provenance
from infra.settings import load_settings


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def make(folder: Path, text: str = "weights") -> Manifest:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/w.bin").write_bytes(text.encode() * 1000)
    (folder / "config.json").write_text("{}")
    return write_manifest(folder, "base", Provenance())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_artifact_pushed_is_fetched_by_name_and_by_content_with_its_seal(store: ArtifactStore, tmp_path: Path) -> None:
    ours = tmp_path / "ours/artifacts/base-1"
    manifest = make(ours)
    assert (store.manifest("base-1"), store.find(manifest.digest)) == (None, None)
    store.push(ours)
    theirs = tmp_path / "theirs/artifacts"
    assert store.fetch("base-1", theirs) == theirs / "base-1"
    assert files(theirs / "base-1") == files(ours)
    (ours / "seal").mkdir()
    (ours / "seal/signature.json").write_text("signed")  # said later, when everything else is everywhere
    store.push(ours)
    assert store.fetch_digest(manifest.digest, theirs) == theirs / "base-1"
    assert (theirs / "base-1/seal/signature.json").read_text() == "signed"


def test_artifact_without_weights_is_fetched_by_a_driver_and_whole_where_they_are_needed(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = make(tmp_path / "ours/artifacts/base-1")
    store.push(tmp_path / "ours/artifacts/base-1")
    driver = tmp_path / "driver/artifacts"
    light = ["config.json", "manifest.json"]
    assert files(store.fetch("base-1", driver, no_weights)) == light
    with pytest.raises(ArtifactError, match=r"w\.bin: named in the manifest but absent"):
        verify(driver / "base-1")
    store.place.write("artifacts/base-1/config.json", b"()")  # what is here is not fetched again
    assert files(store.fetch("base-1", driver, no_weights)) == light
    with pytest.raises(ArtifactError, match=r"config\.json: sha256"):
        store.fetch("base-1", tmp_path / "other/artifacts", no_weights)
    store.place.write("artifacts/base-1/config.json", b"{}")
    assert verify(store.fetch("base-1", driver)) == manifest
    store.place.remove("artifacts/base-1/sub/w.bin")
    assert files(store.fetch("base-1", driver, no_weights)) == ["config.json", "manifest.json", "sub/w.bin"], "what is whole stays so"


def test_artifact_whose_manifest_is_not_up_yet_does_not_exist(store: ArtifactStore, tmp_path: Path) -> None:
    make(tmp_path / "artifacts/base-1")
    store.push(tmp_path / "artifacts/base-1")
    store.place.remove("artifacts/base-1/manifest.json")  # as where the machine was lost on the way
    with pytest.raises(ArtifactError, match="no complete artifact 'base-1'"):
        store.fetch("base-1", tmp_path / "other")
    store.push(tmp_path / "artifacts/base-1")
    assert store.fetch("base-1", tmp_path / "other").is_dir()


def test_damaged_artifact_of_the_store_is_not_put_in_place(store: ArtifactStore, tmp_path: Path) -> None:
    make(tmp_path / "artifacts/base-1")
    store.push(tmp_path / "artifacts/base-1")
    store.place.write("artifacts/base-1/sub/w.bin", b"W" * 7000)
    with pytest.raises(ArtifactError, match=r"w\.bin: sha256"):
        store.fetch("base-1", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_artifact_damaged_here_does_not_go_up(store: ArtifactStore, tmp_path: Path) -> None:
    make(tmp_path / "artifacts/base-1")
    (tmp_path / "artifacts/base-1/sub/w.bin").write_bytes(b"x" * 7000)
    with pytest.raises(ArtifactError, match=r"w\.bin: sha256"):
        store.push(tmp_path / "artifacts/base-1")
    assert store.place.names("artifacts") == []


def test_same_step_made_twice_apart_is_told_and_the_first_stays(store: ArtifactStore, tmp_path: Path) -> None:
    first = make(tmp_path / "one/base-1")
    make(tmp_path / "two/base-1", "others")
    store.push(tmp_path / "one/base-1")
    with pytest.raises(ArtifactError, match="made the same step apart"):
        store.push(tmp_path / "two/base-1")
    found = store.manifest("base-1")
    assert found is not None
    assert found.digest == first.digest


def test_manifest_that_names_a_file_outside_fetches_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = make(tmp_path / "artifacts/base-1")
    store.push(tmp_path / "artifacts/base-1")
    text = manifest.model_dump_json().replace("sub/w.bin", "../../w.bin")
    store.place.write("artifacts/base-1/manifest.json", text.encode())
    with pytest.raises(ArtifactError, match="lies outside"):
        store.fetch("base-1", tmp_path / "other")


def test_several_who_fetch_at_once_get_one_whole_folder(store: ArtifactStore, tmp_path: Path) -> None:
    make(tmp_path / "artifacts/base-1")
    store.push(tmp_path / "artifacts/base-1")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(store.fetch("base-1", tmp_path / "home/artifacts"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "home/artifacts/base-1"] * 4
    assert files(tmp_path / "home/artifacts") == [f"base-1/{name}" for name in files(tmp_path / "artifacts/base-1")]


def test_writers_of_the_same_name_at_once_leave_one_whole_file(store: ArtifactStore) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                store.place.write("staging/one/config.json", content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert store.place.read("staging/one/config.json") in contents
    assert store.place.names("staging") == ["one/config.json"]


def test_file_comes_back_by_its_content(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("rows")
    sha256 = store.push_file(tmp_path / "rows.jsonl")
    store.fetch_file(sha256, tmp_path / "deep/er/rows.jsonl")
    assert (tmp_path / "deep/er/rows.jsonl").read_text() == "rows"
    store.place.write(f"files/{sha256}", b"wors")
    with pytest.raises(ArtifactError, match="absent or damaged"):
        store.fetch_file(sha256, tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


def test_store_that_cannot_be_written_says_where_and_why(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "store/artifacts").write_text("a file, where a folder is needed")
    make(tmp_path / "mine/base-1")
    with pytest.raises(TransientError, match="NotADirectoryError"):
        store.push(tmp_path / "mine/base-1")


def test_artifact_that_was_cut_off_on_the_way_up_is_none_and_goes_up_when_pushed_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    make(tmp_path / "mine/base-1")
    in_the_way = tmp_path / "store/artifacts/base-1/sub"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(TransientError):
        store.push(tmp_path / "mine/base-1")
    assert store.manifest("base-1") is None
    in_the_way.unlink()
    store.push(tmp_path / "mine/base-1")
    assert files(store.fetch("base-1", tmp_path / "other")) == files(tmp_path / "mine/base-1")


@pytest.mark.parametrize(
    ("url", "said"),
    [("ftp://host/folder", "'ftp' is no kind of store"), ("s3://key:secret@bucket/x", "the address holds a key")],
)
def test_store_address_that_cannot_be_used_is_refused_when_it_is_read(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_STORE", url)
    with pytest.raises(ConfigError, match=said) as raised:
        load_settings()
    assert "SLIPWAY_STORE=" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_program_that_used_a_bucket_ends_without_the_thread_that_spoke_to_it(bucket: str) -> None:
    """Left running it met the end of the interpreter, and the program was aborted after its last line, one time in twenty-five."""
    code = (
        "import atexit, threading\n"
        "atexit.register(lambda: print([each.name for each in threading.enumerate()]))\n"
        "from infra.artifact_store import open_store\n"
        f"open_store({bucket!r}).place.write('one', b'1')\n"
        "print([each.name for each in threading.enumerate()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    working, at_the_end = done.stdout.splitlines()
    assert "fsspecIO" in working
    assert "fsspecIO" not in at_the_end
