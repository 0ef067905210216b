"""What a driver tells a program that runs on another machine, and what that tells it, by files in the artifact store.

- The order is the program's job, with every path below the driver's home written as `slipway-home:<path in it>`, and the names of all that
  it reads: artifacts by digest, plain files by sha256. Each machine puts them into a home of its own, wherever that is.
- Beside the order lie the newest progress, and at the end the result, written last: exit code, known error, end of the log, and where the
  output is. An order's name follows from the step's slot, so that two drivers of the same step write the same one.
- Nothing secret is in an order: keys come from each machine's own environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from infra.artifact_store import ArtifactStore
from infra.config import Config
from infra.contracts import read_manifest
from infra.errors import BY_NAME, ArtifactError, SlipwayError
from infra.travel import HubSource, fetch_from_hub

HOME = "slipway-home:"
C = TypeVar("C", bound=Config)


class KnownError(Config):
    """An error raised on purpose, as it travels."""

    type: str
    message: str

    def as_error(self) -> SlipwayError:
        """The error itself."""
        return BY_NAME.get(self.type, SlipwayError)(self.message)


class Order(Config):
    """One program to run."""

    module: str
    job: dict[str, Any]
    artifacts: dict[str, str] = Field(default_factory=dict)
    """Name and digest of each artifact that the program reads."""
    files: dict[str, str] = Field(default_factory=dict)
    """Path in the home and sha256 of each plain file that it reads."""
    hub: tuple[HubSource, ...] = ()
    """What it reads from the Hugging Face hub, fetched first: programs run offline and find it in the hub's cache."""


class Result(Config):
    """How an order ended."""

    exit_code: int
    error: KnownError | None = None
    log_tail: str = ""
    artifact: str | None = None
    """Name of the output in the store, where it is a whole artifact."""
    files: dict[str, str] = Field(default_factory=dict)
    """Path in the home and sha256 of each other file that was made for the driver."""


def beside(order_name: str, suffix: str) -> str:
    """Name of a file beside an order: `result.json`, `progress.jsonl`, `stop` and so on."""
    return f"{order_name.removesuffix('.json')}.{suffix}"


def read(store: ArtifactStore, name: str, model: type[C]) -> C | None:
    """The order or result of that name, None where there is none. Raises ArtifactError on one that another version wrote."""
    content = store.place.read(name)
    if content is None:
        return None
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(
            f"{store.place.url}/{name}: not as this version of Slipway writes it: {error}. Use one version everywhere."
        ) from error


def write(store: ArtifactStore, name: str, value: Config) -> None:
    """Writes an order or a result."""
    store.place.write(name, value.model_dump_json(indent=1).encode())


def packed(value: Any, home: Path) -> Any:
    """JSON with every path below `home` written so that any machine can read it."""
    if isinstance(value, dict):
        return {key: packed(each, home) for key, each in value.items()}
    if isinstance(value, list):
        return [packed(each, home) for each in value]
    if isinstance(value, str) and value.startswith(f"{home}/"):
        return f"{HOME}{value.removeprefix(f'{home}/')}"
    return value


def unpacked(value: Any, home: Path) -> Any:
    """The same JSON with paths in this machine's home. Raises ArtifactError on a path that leads out of it."""
    if isinstance(value, dict):
        return {key: unpacked(each, home) for key, each in value.items()}
    if isinstance(value, list):
        return [unpacked(each, home) for each in value]
    if isinstance(value, str) and HOME in value:
        before, _, path = value.partition(HOME)  # `before` is a source's kind, such as `file:`
        return f"{before}{inside(home, path)}"
    return value


def inside(home: Path, path: str) -> Path:
    """A path in the home. Raises ArtifactError where it leads out of it."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ArtifactError(f"an order names {path!r}, which lies outside of SLIPWAY_HOME. It was not written by Slipway; nothing was run.")
    return home / path


def arrive(store: ArtifactStore, order: Order, home: Path) -> dict[str, Any]:
    """The job as this machine runs it, once all that it reads is here and verified. Raises ArtifactError, ConfigError or TransientError."""
    for name, digest in order.artifacts.items():
        folder = store.fetch(inside(home / "artifacts", name).name, home / "artifacts")
        if (found := read_manifest(folder).digest) != digest:
            raise ArtifactError(f"{store.place.url}: {name} has digest {found}, the order needs {digest}. Run the driver's command again.")
    for path, sha256 in order.files.items():
        store.fetch_file(sha256, inside(home, path))
    fetch_from_hub(order.hub)
    job: dict[str, Any] = unpacked(json.loads(json.dumps(order.job)), home)
    return job


def pushed_files(store: ArtifactStore, home: Path, *places: Path | None) -> dict[str, str]:
    """Pushes the files at or below `places`, all in the home; path in it and sha256 of each."""
    found = [path for place in places if place is not None for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {path.relative_to(home).as_posix(): store.push_file(path) for path in found if path.is_file()}
