"""The content-addressed store of step outputs on this machine.

`artifacts/<step>-<id16>/` is complete when it has a manifest; `staging/<step>-<id16>/` is an attempt, kept when it fails so that the next
one resumes. One lock file an identity keeps two runs from making the same thing at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from infra.contracts import MANIFEST_NAME, has_all_files, read_manifest
from infra.errors import ArtifactError
from infra.settings import Settings
from pipelines.step import Artifact, Step

ID_CHARS = 16


@dataclass(frozen=True)
class Slot:
    """Where the output of one step with one identity lies, and where attempts at it are made."""

    final_dir: Path
    staging_dir: Path
    lock_file: Path

    @property
    def output_dir(self) -> Path:
        """Where an attempt writes; other files of the attempt (config, progress, checkpoints) lie beside it."""
        return self.staging_dir / "output"

    def artifact(self) -> Artifact | None:
        """The complete output, or None."""
        if not (self.final_dir / MANIFEST_NAME).is_file():
            return None
        manifest = read_manifest(self.final_dir)
        return Artifact(self.final_dir, manifest) if has_all_files(self.final_dir, manifest) else None

    def publish(self) -> Artifact:
        """Moves a finished attempt into place at once. Raises ArtifactError when it left no manifest."""
        if not (self.output_dir / MANIFEST_NAME).is_file():
            raise ArtifactError(f"{self.output_dir}: the step ended without writing {MANIFEST_NAME}; this is a bug in the step.")
        if self.final_dir.exists():  # files are missing from it: `artifact()` just said so
            shutil.rmtree(self.final_dir)
        self.final_dir.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.output_dir, self.final_dir)
        shutil.rmtree(self.staging_dir, ignore_errors=True)
        return Artifact(self.final_dir, read_manifest(self.final_dir))

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the identity's lock; calls `on_wait` once when another run has it."""
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def slot(settings: Settings, step: Step, input_digests: Mapping[str, str]) -> Slot:
    """The place of a step's output, given the digests of its inputs."""
    folder = f"{step.name}-{step.identity(input_digests)[:ID_CHARS]}"
    return Slot(
        final_dir=settings.artifacts_dir / folder,
        staging_dir=settings.staging_dir / folder,
        lock_file=settings.home / "locks" / f"{folder}.lock",
    )
