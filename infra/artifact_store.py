"""The artifacts of steps where every machine reaches them: a folder or a bucket, by fsspec URL (`SLIPWAY_STORE`).

- The layout is the home's own: `artifacts/<step>-<id16>/` is complete when it has a manifest, which goes up last; `staging/<slot>/` is what
  a program that runs elsewhere is told and tells (`infra/orders.py`); `files/<sha256>` are plain inputs, such as a user's rows, which are
  taken out some time after the last order that names them (`infra/store_cleaning.py`).
- `digests/<digest>` holds the name of the artifact with that content, for those who know nothing else of it, such as a server.
- What goes up is verified first, what comes down before it is put in place, file by file, against the manifest.
- A driver whose programs run elsewhere fetches an artifact without its weights, which it does not read.
- What lies beside an artifact's own files (its seal) travels with it, and may be pushed later by pushing it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from infra.contracts import MANIFEST_NAME, SEAL_DIR, Manifest, Wanted, every_file, has_all_files, read_manifest, verify
from infra.errors import ArtifactError
from infra.files import sha256_file
from infra.places import Place

ARTIFACTS = "artifacts"
DIGESTS = "digests"
FILES = "files"
ORDER_PLACES = ("staging", "runs")
"""Where orders and results lie (infra/orders.py): what they name in `files/` is in use."""
UNUSED_S = 24 * 3600.0
"""Age from which a plain file that nothing names may be removed (infra/store_cleaning.py)."""


def open_store(url: str) -> ArtifactStore:
    """The store at an fsspec URL or a folder. Raises ConfigError on an address that cannot be one."""
    return ArtifactStore(Place(url))


class ArtifactStore:
    """Artifacts by name and by content, below one place."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of the complete artifact `name`, None where the store has none. Raises ArtifactError on a damaged one."""
        content = self.place.read(f"{ARTIFACTS}/{name}/{MANIFEST_NAME}")
        if content is None:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError as error:
            raise ArtifactError(
                f"{self.place.url}/{ARTIFACTS}/{name}: its manifest is damaged: {error}. Remove it and push again."
            ) from error

    def find(self, digest: str) -> str | None:
        """The name of an artifact with this content, None where the store has none."""
        content = self.place.read(f"{DIGESTS}/{digest}")
        return content.decode() if content else None

    def push(self, folder: Path, name: str | None = None) -> Manifest:
        """Makes the artifact in `folder` one of the store, as `name` or else as the folder is called; only what is missing goes up.

        Raises ArtifactError where the folder is not what its manifest says, or where the store has other content of that name.
        """
        name = name or folder.name
        there = self.manifest(name)
        manifest = read_manifest(folder) if there else verify(folder)
        if there is not None and there.digest != manifest.digest:
            raise ArtifactError(
                f"{self.place.url}/{ARTIFACTS}/{name} holds content {there.digest[:16]}, {folder} holds {manifest.digest[:16]}: two runs "
                "made the same step apart. Use the store's: remove the folder and run again."
            )
        sent = [] if there else list(manifest.files)
        known = set(self.place.names(f"{ARTIFACTS}/{name}/{SEAL_DIR}")) if there else set()
        seal = [path.relative_to(folder).as_posix() for path in sorted((folder / SEAL_DIR).rglob("*")) if path.is_file()]
        sent += [file for file in seal if file.removeprefix(f"{SEAL_DIR}/") not in known or self._differs(folder / file, name, file)]
        self.place.put_all({f"{ARTIFACTS}/{name}/{file}": folder / file for file in sent})
        if there is None:
            self.place.put(folder / MANIFEST_NAME, f"{ARTIFACTS}/{name}/{MANIFEST_NAME}")
        if self.find(manifest.digest) is None:
            self.place.write(f"{DIGESTS}/{manifest.digest}", name.encode())
        return manifest

    def fetch(self, name: str, artifacts_dir: Path, wanted: Wanted = every_file) -> Path:
        """The folder `name` in `artifacts_dir`, fetched where it does not hold all that is wanted; one process of a machine at a time.

        Raises ArtifactError where the store has none, or where it is not what its manifest says; nothing is left in place then.
        """
        with FileLock(artifacts_dir.parent / "locks" / f"{name}.fetch.lock"):
            self.fetch_to(name, artifacts_dir / name, wanted)
        return artifacts_dir / name

    def fetch_to(self, name: str, folder: Path, wanted: Wanted = every_file) -> None:
        """Makes `folder` the artifact `name`, verified, where it is not yet; without files that are not wanted. Raises what `fetch` does.

        A folder without some of them counts as no artifact where it is asked for whole: it is fetched again, or made again.
        """
        manifest = self.manifest(name)
        if manifest is None:
            raise ArtifactError(f"{self.place.url} has no complete artifact {name!r}. Run the step that makes it again.")
        if _is_here(folder, manifest, wanted):
            self._get_seal(name, folder)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
            fetched = Path(scratch) / "artifact"
            self._get(name, manifest, fetched, wanted)
            if (held := verify(fetched, wanted=wanted).digest) != manifest.digest:
                raise ArtifactError(f"{self.place.url}/{ARTIFACTS}/{name}: it changed while it was fetched, to {held}. Fetch it again.")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(fetched, folder)

    def fetch_digest(self, digest: str, artifacts_dir: Path) -> Path:
        """The folder of the artifact with this content, fetched where this machine has none. Raises what `fetch` does."""
        name = self.find(digest)
        if name is None:
            raise ArtifactError(
                f"{self.place.url} has no artifact with digest {digest}. Push it: `slipway run` does where SLIPWAY_STORE is set."
            )
        folder = self.fetch(name, artifacts_dir)
        if (held := read_manifest(folder).digest) != digest:
            raise ArtifactError(f"{self.place.url}: {name} has digest {held}, {digest} was asked for. Push that model again.")
        return folder

    def push_file(self, path: Path) -> str:
        """Makes a plain file one of the store, by its content; its sha256. One that is there and old is put again, and so young again."""
        sha256 = sha256_file(path)
        made_s = self.place.modified_s(f"{FILES}/{sha256}")
        if made_s is None or abs(time.time() - made_s) > UNUSED_S / 2:
            self.place.put(path, f"{FILES}/{sha256}")
        return sha256

    def fetch_file(self, sha256: str, path: Path) -> None:
        """Puts the file with this content at `path`. Raises ArtifactError where the store has none, or something else."""
        if path.is_file() and sha256_file(path) == sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.fetching")
        try:
            if not self.place.get(f"{FILES}/{sha256}", partial) or sha256_file(partial) != sha256:
                raise ArtifactError(f"{self.place.url}/{FILES}/{sha256} is absent or damaged; {path} needs it. Run the same command again.")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _get(self, name: str, manifest: Manifest, folder: Path, wanted: Wanted) -> None:
        """What is wanted of the artifact into `folder`, its manifest as the one that was just read."""
        for file in manifest.files:
            if not (folder / file).resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"{self.place.url}/{ARTIFACTS}/{name} names {file!r}, which lies outside of it. Nothing was fetched.")
        files = [file for file in manifest.files if wanted(file)]
        self.place.get_all({f"{ARTIFACTS}/{name}/{file}": folder / file for file in (*files, MANIFEST_NAME)})
        self._get_seal(name, folder)

    def _get_seal(self, name: str, folder: Path) -> None:
        """What was said of the artifact, as far as it is not there: it may have been pushed after the rest was fetched."""
        beside = [f"{SEAL_DIR}/{file}" for file in self.place.names(f"{ARTIFACTS}/{name}/{SEAL_DIR}")]
        self.place.get_all({f"{ARTIFACTS}/{name}/{file}": folder / file for file in beside if not (folder / file).is_file()})

    def _differs(self, path: Path, name: str, file: str) -> bool:
        return self.place.read(f"{ARTIFACTS}/{name}/{file}") != path.read_bytes()


def _is_here(folder: Path, manifest: Manifest, wanted: Wanted) -> bool:
    """Whether the folder holds what is wanted of this very content, by names and sizes."""
    with contextlib.suppress(ArtifactError):
        return read_manifest(folder).digest == manifest.digest and has_all_files(folder, manifest, wanted)
    return False
