"""The folder of a batch's answers, and what it says of itself.

- `part-NNNNNN.jsonl` (or `.parquet`): whole or absent. Their rows, in the order of the parts' names, are in the order of the input.
- `_batch.json`: what is answered, by what and how; written first. A folder that was begun with anything else is refused.
- `_parts.jsonl`: what each finished part holds, in numbers. `.work/`: the lock, and the notes of running workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import ConfigError, TransientError
from infra.files import PARTIAL_SUFFIX, read_json, write_json_atomic, write_text_atomic
from infra.provenance import Provenance
from serving.batch.answers import Tally
from serving.batch.journal import SUFFIX, Note, decode, encode
from serving.batch.parts import InputFile, Part
from serving.config import BATCH_MANIFEST_NAME, BatchFormat, EngineName, EngineWeights, Precision

DONE_NAME = "_parts.jsonl"
WORK_NAME = ".work"
MAX_DIFFERENCES = 8


class Settings(Config):
    """What decides the answers."""

    model_name: str
    model_digest: str
    adapters: dict[str, str] = Field(default_factory=dict)
    """Digests of those beside the model, by name."""
    engine: EngineName
    weights: EngineWeights
    precision: Precision
    max_tokens_limit: int
    default_max_tokens: int
    max_body_bytes: int
    rows_per_part: int
    ignored_fields: tuple[str, ...]
    format: BatchFormat


class Result(Config):
    """What there is in the end, and what the last run did for it."""

    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    rows_answered_now: int
    """Rows of the last run; the others were there already."""
    seconds: float
    """Length of the last run, with the start of its engines."""
    tokens_per_s: float | None
    """New tokens of the last run by its time without the start of its engines; None where that was too short to tell."""


class Manifest(Config):
    """`_batch.json`."""

    schema_version: Literal[1] = 1
    input: dict[str, InputFile]
    settings: Settings
    provenance: Provenance
    result: Result | None = None
    """None until every row is answered."""


class BatchFolder:
    """The folder, as one run sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out. Raises TransientError where there is one, ConfigError where the folder holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: this is a file; a folder for the answers is needed.")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / WORK_NAME).is_dir():
            raise ConfigError(f"{self.path}: holds files that are not answers of a batch. Name an empty or a new folder.")
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise TransientError(f"{self.path}: another run is writing answers here. Wait until it is done, or stop it.") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, manifest: Manifest) -> None:
        """Writes the manifest, or checks it against the one that is there. Raises ConfigError that names what has changed."""
        for path in self.path.glob(f".*{PARTIAL_SUFFIX}"):  # of a run that was killed
            path.unlink(missing_ok=True)
        path = self.path / BATCH_MANIFEST_NAME
        if not path.is_file():
            write_json_atomic(path, manifest.model_dump(mode="json"))
            return
        try:
            begun = Manifest.model_validate(read_json(path))
        except ValidationError as error:
            raise ConfigError(f"{path}: not the manifest of a batch: {error}. Name another folder.") from error
        if changes := _changes(begun, manifest):
            shown = "\n".join(f"  - {line}" for line in changes[:MAX_DIFFERENCES])
            raise ConfigError(
                f"{self.path}: holds answers of another batch; since then {len(changes)} thing(s) changed\n{shown}\n"
                "Name another folder, or run with what they were."
            )

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest with its result."""
        write_json_atomic(self.path / BATCH_MANIFEST_NAME, manifest.model_dump(mode="json"))

    def part_file(self, part: Part, settings: Settings) -> Path:
        """Where the answers of a part are."""
        return self.path / f"part-{part.number:06d}.{settings.format}"

    def done(self, parts: Iterable[Part], settings: Settings) -> dict[int, Tally]:
        """The finished parts: those with a file whose numbers are known. Gathers them in `_parts.jsonl` and forgets all other notes."""
        journals = [*self.path.glob(DONE_NAME), *self.work.glob(f"*{SUFFIX}")]
        found = {note.part: note for path in journals for note in map(decode, _whole_lines(path)) if note.is_done}
        done = {
            part.number: found[part.number].tally for part in parts if part.number in found and self.part_file(part, settings).is_file()
        }
        write_text_atomic(self.path / DONE_NAME, "".join(encode(Note(number, tally, True)) for number, tally in done.items()))
        for path in self.work.glob(f"*{SUFFIX}"):
            path.unlink()
        return done


def _whole_lines(path: Path) -> list[bytes]:
    """A last line may be cut off where its writer was killed."""
    return path.read_bytes().split(b"\n")[:-1]


def _changes(begun: Manifest, now: Manifest) -> list[str]:
    before, after = (_flat(manifest.model_dump(mode="json", include={"input", "settings"})) for manifest in (begun, now))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: was {_shown(before, key)}, is {_shown(after, key)}" for key in keys if before.get(key) != after.get(key)]


def _flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{above} {key}" if above else key
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
