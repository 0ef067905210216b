"""What workers note of their parts: a line each second for those they are answering, and a last one before a part's file appears.

Each worker appends to a file of its own; the last line of a part counts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.batch.answers import Tally

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Note:
    """The state of one part."""

    part: int
    tally: Tally
    is_done: bool


class Journal:
    """The notes of one worker, or all done parts as one file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{uuid.uuid4().hex}{SUFFIX}"

    def write(self, notes: Iterable[Note]) -> None:
        """Appends notes."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(encode(note) for note in notes)


class JournalReader:
    """The newest notes of all workers; each look reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self.notes: dict[int, Note] = {}
        """By part."""

    def look(self) -> None:
        """Takes in what has been written since the last look; a line that is not whole yet waits for the next."""
        for path in self._folder.glob(f"*{SUFFIX}"):
            with path.open("rb") as stream:
                stream.seek(self._offsets.get(path, 0))
                lines = stream.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for note in map(decode, whole.splitlines()):
                before = self.notes.get(note.part)
                if before is None or not before.is_done or note.is_done:  # a worker that was lost may have left a half-done part behind
                    self.notes[note.part] = note


def encode(note: Note) -> str:
    """A note as a line."""
    return json.dumps({"part": note.part, "is_done": note.is_done, **asdict(note.tally)}) + "\n"


def decode(line: bytes) -> Note:
    """The note in a line."""
    data = json.loads(line)
    return Note(data.pop("part"), is_done=data.pop("is_done"), tally=Tally(**data))
