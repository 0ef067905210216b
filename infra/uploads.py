"""An artifact in an MLflow run, where other machines reach it, and back again.

- Files larger than a part go up as parts, each a file of its own: a cut connection, a proxy's limit on a request's time or size, or a
  server without multipart uploads then costs one part and not 2 GB (mlflow issues 8539, 7564). Every part is tried again for a while.
- The manifest goes up last, so its presence means that the artifact is complete, as on disk.
- What comes down is verified file by file against its manifest, and against the digest that the registry has, before it is put in place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from infra.contracts import MANIFEST_NAME, read_manifest, verify
from infra.errors import ArtifactError
from infra.files import CHUNK_BYTES
from infra.patience import patiently

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PLACE = "model"
PARTS_SUFFIX = ".parts"
PART_BYTES = 64 << 20
PATIENCE_S = 300.0
Report = Callable[[str], None]


def upload(
    mlflow: MlflowClient, run_id: str, folder: Path, scratch_dir: Path, part_bytes: int = PART_BYTES, patience_s: float = PATIENCE_S
) -> str:
    """Puts the artifact in `folder` into the run; its address there. `scratch_dir` holds one part at a time.

    Raises TransientError when the store did not take a part for `patience_s`.
    """

    def send(path: Path, place: str) -> None:
        patiently(lambda: mlflow.log_artifact(run_id, str(path), place), f"{folder}: {path.name} into run {run_id}", patience_s)

    for name, entry in read_manifest(folder).files.items():
        place = (Path(PLACE) / name).parent.as_posix()
        if entry.size_bytes <= part_bytes:
            send(folder / name, place)
            continue
        scratch_dir.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("rb") as whole, tempfile.TemporaryDirectory(dir=scratch_dir) as scratch:
            for number in range(-(-entry.size_bytes // part_bytes)):
                part = Path(scratch) / f"{number:06d}"
                part.write_bytes(whole.read(part_bytes))
                send(part, f"{PLACE}/{name}{PARTS_SUFFIX}")
                part.unlink()
    send(folder / MANIFEST_NAME, PLACE)
    return f"{mlflow.get_run(run_id).info.artifact_uri.rstrip('/')}/{PLACE}"


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


def find_here(digest: str, artifacts_dir: Path) -> Path | None:
    """The artifact with this digest on this machine, made here or fetched before."""
    for manifest in sorted(artifacts_dir.glob(f"*/{MANIFEST_NAME}")):
        if read_manifest(manifest.parent).digest == digest:
            return manifest.parent
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
    for name in read_manifest(folder).files:
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"run {run_id}: its manifest names {name!r}, which lies outside the artifact. Nothing was fetched.")
        target.parent.mkdir(parents=True, exist_ok=True)
        place = (Path(PLACE) / name).as_posix()
        parts = patiently(lambda place=place: mlflow.list_artifacts(run_id, place + PARTS_SUFFIX), f"run {run_id}: {place}", patience_s)  # type: ignore[misc]
        if not parts:
            shutil.move(get(place), target)
            continue
        with target.open("wb") as whole:
            for part in sorted(parts, key=lambda part: part.path):
                piece = get(part.path)
                with piece.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, CHUNK_BYTES)
                piece.unlink()
    return folder
