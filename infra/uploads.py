"""An artifact in an MLflow run, where other machines reach it, and back again.

- Files larger than a part go up as parts, each a file of its own: a cut connection, a proxy's limit on a request's time or size, or a
  server without multipart uploads then costs one part and not 2 GB (mlflow issues 8539, 7564). Every part is tried again for a while.
- The manifest goes up last, so its presence means that the artifact is complete, as on disk. What lies beside it (a signature) goes too.
- What comes down is verified file by file against its manifest, and against the digest that the registry has, before it is put in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from infra.contracts import MANIFEST_NAME, Manifest, has_all_files, read_manifest, verify
from infra.errors import ArtifactError
from infra.files import CHUNK_BYTES, read_json, write_json_atomic
from infra.patience import patiently

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PLACE = "model"
INDEX_NAME = "parts.json"
PARTS_SUFFIX = ".parts"
PART_BYTES = 64 << 20
PATIENCE_S = 300.0


def upload(
    mlflow: MlflowClient, run_id: str, folder: Path, scratch_dir: Path, part_bytes: int = PART_BYTES, patience_s: float = PATIENCE_S
) -> str:
    """Puts the artifact in `folder` into the run; its address there. `scratch_dir` holds one part at a time.

    Raises TransientError when the store did not take a part for `patience_s`.
    """
    send = _sender(mlflow, run_id, folder, patience_s)
    scratch_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch_dir) as scratch:
        for name, entry in read_manifest(folder).files.items():
            if entry.size_bytes <= part_bytes:
                send(folder / name, (Path(PLACE) / name).parent.as_posix())
                continue
            with (folder / name).open("rb") as whole:
                for number in range(num_parts(entry.size_bytes, part_bytes)):
                    part = Path(scratch) / part_name(number)
                    part.write_bytes(whole.read(part_bytes))
                    send(part, f"{PLACE}/{name}{PARTS_SUFFIX}")
                    part.unlink()
        _send_beside(send, folder, Path(scratch), part_bytes)
    send(folder / MANIFEST_NAME, PLACE)
    return f"{mlflow.get_run(run_id).info.artifact_uri.rstrip('/')}/{PLACE}"


def upload_beside(mlflow: MlflowClient, run_id: str, folder: Path, scratch_dir: Path, patience_s: float = PATIENCE_S) -> None:
    """Puts what lies beside the artifact's own files, such as a signature that came later, to those that are in the run already."""
    scratch_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch_dir) as scratch:
        part_bytes = _index(mlflow, run_id, Path(scratch), patience_s)["part_bytes"]
        _send_beside(_sender(mlflow, run_id, folder, patience_s), folder, Path(scratch), part_bytes)


def _sender(mlflow: MlflowClient, run_id: str, folder: Path, patience_s: float) -> Callable[[Path, str], None]:
    def send(path: Path, place: str) -> None:
        patiently(lambda: mlflow.log_artifact(run_id, str(path), place), f"{folder}: {path.name} into run {run_id}", patience_s)

    return send


def _send_beside(send: Callable[[Path, str], None], folder: Path, scratch: Path, part_bytes: int) -> None:
    """What the manifest does not name, and the index that tells of it and of how large a part is."""
    named = {MANIFEST_NAME, *read_manifest(folder).files}
    beside = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - named)
    for name in beside:
        send(folder / name, (Path(PLACE) / name).parent.as_posix())
    write_json_atomic(scratch / INDEX_NAME, {"part_bytes": part_bytes, "beside": beside})
    send(scratch / INDEX_NAME, PLACE)


def _index(mlflow: MlflowClient, run_id: str, scratch: Path, patience_s: float) -> dict[str, Any]:
    place = f"{PLACE}/{INDEX_NAME}"
    path = patiently(lambda: mlflow.download_artifacts(run_id, place, str(scratch)), f"run {run_id}: {place}", patience_s)
    found: dict[str, Any] = read_json(Path(path))
    return found


def num_parts(size_bytes: int, part_bytes: int) -> int:
    """How many parts a file has in the store; 0 where it is whole."""
    return 0 if size_bytes <= part_bytes else -(-size_bytes // part_bytes)


def part_name(number: int) -> str:
    """File name of one part; sorted as text they are in order."""
    return f"{number:06d}"


def download(mlflow: MlflowClient, run_id: str, digest: str, artifacts_dir: Path, patience_s: float = PATIENCE_S) -> Path:
    """The folder of the artifact with this digest, fetched from the run when this machine has none. Raises ArtifactError on a mismatch."""
    found = find_here(digest, artifacts_dir)
    if found is not None:
        return found
    final_dir = artifacts_dir / f"fetched-{digest[:16]}"
    artifacts_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(artifacts_dir.parent / f"{final_dir.name}.lock"):
        if (found := find_here(digest, artifacts_dir)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=artifacts_dir, prefix=".fetching-") as scratch:
            folder = _fetch(mlflow, run_id, Path(scratch), patience_s)
            if (held := verify(folder).digest) != digest:
                raise ArtifactError(f"run {run_id}: its artifact has digest {held}, the registry says {digest}. Register the model again.")
            if final_dir.exists():  # without a manifest, or `find_here` had seen it
                shutil.rmtree(final_dir)
            os.replace(folder, final_dir)
    return final_dir


def manifest_in(mlflow: MlflowClient, run_id: str, patience_s: float = PATIENCE_S) -> Manifest:
    """The manifest of the artifact in a run, whose files stay there. Raises ArtifactError on one of another schema."""
    place = f"{PLACE}/{MANIFEST_NAME}"
    with tempfile.TemporaryDirectory() as scratch:
        path = patiently(lambda: mlflow.download_artifacts(run_id, place, scratch), f"run {run_id}: {place}", patience_s)
        return read_manifest(Path(path).parent)


def find_here(digest: str, artifacts_dir: Path) -> Path | None:
    """The artifact with this digest on this machine, made here or fetched before."""
    for path in sorted(artifacts_dir.glob(f"*/{MANIFEST_NAME}")):
        with contextlib.suppress(ArtifactError):  # of another schema, or damaged: not this one
            manifest = read_manifest(path.parent)
            if manifest.digest == digest and has_all_files(path.parent, manifest):
                return path.parent
    return None


def _fetch(mlflow: MlflowClient, run_id: str, scratch: Path, patience_s: float) -> Path:
    """The artifact of the run below `scratch`, its parts joined."""

    def get(place: str) -> Path:
        what = f"run {run_id}: {place}"
        return Path(patiently(lambda: mlflow.download_artifacts(run_id, place, str(scratch / "down")), what, patience_s))

    (scratch / "down").mkdir()
    folder = scratch / "artifact"
    folder.mkdir()
    shutil.move(get(f"{PLACE}/{MANIFEST_NAME}"), folder / MANIFEST_NAME)
    index = _index(mlflow, run_id, scratch / "down", patience_s)
    sizes_bytes = {name: entry.size_bytes for name, entry in read_manifest(folder).files.items()} | dict.fromkeys(index["beside"], 0)
    for name, size_bytes in sizes_bytes.items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"run {run_id}: its manifest names {name!r}, which lies outside the artifact. Nothing was fetched.")
        target.parent.mkdir(parents=True, exist_ok=True)
        place = (Path(PLACE) / name).as_posix()
        count = num_parts(size_bytes, int(index["part_bytes"]))
        with target.open("wb") as whole:
            for piece in [f"{place}{PARTS_SUFFIX}/{part_name(number)}" for number in range(count)] or [place]:
                fetched = get(piece)
                with fetched.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, CHUNK_BYTES)
                fetched.unlink()
    return folder
