"""Keeps what a program tells while it runs, its progress, in the artifact store as well, and brings word that it is to stop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.artifact_store import ArtifactStore
from infra.errors import SlipwayError
from infra.repeated import repeated

SYNC_S = 2.0
TAIL_BYTES = 1 << 14  # of the progress: only its newest lines are looked at, and a long run has very many
log = logging.getLogger(__name__)


@contextmanager
def mirrored(store: ArtifactStore, progress: tuple[Path | None, str], stop: tuple[Path, str] | None = None) -> Iterator[None]:
    """While the block runs, and once at its end, the end of the file `progress[0]` is `progress[1]` in the store.

    Where `stop[1]` appears in the store, the file `stop[0]` is made here. A store that is away is tried again, and never ends the block.
    """
    seen = [-1]

    def sync() -> None:
        file, name = progress
        try:
            if file is not None and file.is_file() and (size := file.stat().st_size) != seen[0]:
                store.place.write(name, tail(file))
                seen[0] = size
            if stop is not None and not stop[0].exists() and stop[0].parent.is_dir() and store.place.exists(stop[1]):
                stop[0].touch()
        except (SlipwayError, OSError) as error:
            log.warning("progress is not told for now: %s", error)

    with repeated(sync, SYNC_S, "store-mirror"):
        yield


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> bytes:
    """The last whole lines of a file."""
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - num_bytes))
        content = stream.read()
    return content if size <= num_bytes else content.partition(b"\n")[2]
