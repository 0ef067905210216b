"""Which MLflow runs belong to a pipeline that has begun and not ended: a driver that died and starts again goes on with the very same.

It is kept in the artifact store, where programs on other machines go on meanwhile and report to those runs; without a store programs end
with their driver, and each command is a run of its own. The record goes when the pipeline ends by itself, well or not; it stays when the
driver was killed or interrupted, or lost its cluster.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from infra import orders
from infra.artifact_store import ArtifactStore, open_store
from infra.config import Config
from infra.settings import Settings

FINGERPRINT_CHARS = 16


class RunRecord(Config):
    """The runs of one pipeline."""

    tracking_uri: str
    run_id: str = ""
    """Empty while it is about to be made: a driver that was killed then is found out by the name."""
    run_name: str
    """Name of the command's folder in the home, and of its MLflow run."""
    steps: dict[str, str] = Field(default_factory=dict)
    """MLflow run of each step that has begun."""


class RunRecords:
    """The record of the pipeline of one spec; there is none without a store."""

    def __init__(self, settings: Settings, spec_fingerprint: str) -> None:
        self._store: ArtifactStore | None = open_store(settings.store) if settings.store else None
        self._name = f"runs/{spec_fingerprint[:FINGERPRINT_CHARS]}.json"
        self._uri = settings.tracking_uri

    def read(self) -> RunRecord | None:
        """What a driver before this one began, in the same MLflow store, and did not end."""
        found = orders.read(self._store, self._name, RunRecord) if self._store else None
        return found if found is not None and found.tracking_uri == self._uri else None

    def announce(self, run_dir: Path) -> None:
        """Notes that a run of that folder's name is about to be made, unless a driver before this one did."""
        if self.read() is None:
            self._write(RunRecord(tracking_uri=self._uri, run_name=run_dir.name))

    def begin(self, run_id: str, run_dir: Path) -> None:
        """Notes the run of a pipeline that begins, or goes on."""
        before = self.read()
        steps = before.steps if before and before.run_id == run_id else {}
        self._write(RunRecord(tracking_uri=self._uri, run_id=run_id, run_name=run_dir.name, steps=steps))

    def begin_step(self, name: str, run_id: str) -> None:
        """Notes the run of a step that begins, or goes on."""
        if (found := self.read()) is not None and found.steps.get(name) != run_id:
            self._write(found.model_copy(update={"steps": {**found.steps, name: run_id}}))

    def end(self) -> None:
        """Forgets them: the next command of this spec is a run of its own."""
        if self._store is not None:
            self._store.place.remove(self._name)

    def _write(self, record: RunRecord) -> None:
        if self._store is not None:
            orders.write(self._store, self._name, record)
