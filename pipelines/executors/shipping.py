"""What every executor on other machines does alike: sends a job with its inputs, follows its progress, brings its output home.

Where the program runs under a name that follows from the step's slot, and the order and the result lie in the store, a driver that died
and starts again finds what it had begun: a result that is good, a program that runs, or nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra import orders
from infra.artifact_store import ARTIFACTS, ORDER_PLACES, ArtifactStore
from infra.contracts import MANIFEST_NAME, no_weights
from infra.errors import EXIT_DONE, ArtifactError, SlipwayError, TransientError
from infra.files import sha256_json, write_bytes_atomic
from infra.orders import HOME, Order, Result, beside
from infra.process import Job
from infra.travel import STAYS, hub_sources, travelling

PREFIX = "slipway"
INPUTS = "inputs"


class Shipment:
    """One job on its way to another machine and back."""

    def __init__(self, store: ArtifactStore, home: Path, module: str, job: Job) -> None:
        self.store, self.home, self.module, self.job = store, home, module, job
        self.base, part = _place_of(job.output_dir, home)
        self.part = f"{part}-{module.replace('.', '-')}" if part else ""

    @property
    def name(self) -> str:
        """What the program is called where it runs: the same whenever the same step is to be made."""
        return "-".join([PREFIX, Path(self.base).name, *([self.part] if self.part else [])])

    @property
    def order(self) -> str:
        """Name of the order in the store."""
        return f"{self.base}/config{f'-{self.part}' if self.part else ''}.json"

    @property
    def command(self) -> list[str]:
        """What is to be run on the other machine."""
        return ["python", "-m", "infra.remote", "--store", self.store.place.url, "--job", self.order, "--module", self.module]

    def has_order(self) -> bool:
        """Whether an order of this name was sent before."""
        return self.store.place.exists(self.order)

    def is_done(self) -> bool:
        """Whether the program has ended well, and its output waits in the store: `collect` it, start nothing."""
        result = self.result()
        if result is None or result.exit_code != EXIT_DONE:
            return False
        return result.artifact is None or self.store.manifest(result.artifact) is not None

    def result(self) -> Result | None:
        """How the program ended; None while it has not, or where it was killed."""
        return orders.read(self.store, beside(self.order, "result.json"), Result)

    def send(self) -> None:
        """Pushes what the program reads, then the order, in place of any before. Raises ArtifactError where an input is not whole."""
        outside = dict(_outside(self.job))
        left_out = {value: None for value, kind in travelling(self.job) if kind == STAYS}
        job = orders.packed(_replaced(self.job.model_dump(mode="json"), {**outside, **left_out}), self.home)
        artifacts, files = self._push_inputs(job)
        for source, target in outside.items():
            place = Path(source.removeprefix("file:"))
            files |= self._push_outside(place, target.partition(HOME)[2])
        self.store.place.remove(beside(self.order, "result.json"))  # of an attempt before
        hub = hub_sources(self.job)
        orders.write(self.store, self.order, Order(module=self.module, job=job, artifacts=artifacts, files=files, hub=hub))

    def follow(self) -> None:
        """Brings the newest progress to the job's own progress file. Raises what the store does when it is away."""
        if self.job.progress_file is None:
            return
        content = self.store.place.read(beside(self.order, "progress.jsonl"))
        if content:
            write_bytes_atomic(self.job.progress_file, content)

    def collect(self) -> None:
        """Puts what the program made where the job wants it, verified; a model's weights stay in the store, as a driver reads none.

        Raises the program's own known error, SlipwayError with the end of its log where it left none, TransientError where it was killed.
        """
        self.follow()  # its last words may have come after the last look
        result = self.result() or self._found_whole()
        if result is None:
            raise TransientError(f"{self.module} ended without a result ({self.name}): its machine was lost. Run the same command again.")
        for path, sha256 in result.files.items():
            self.store.fetch_file(sha256, orders.inside(self.home, path))
        if result.error is not None:
            raise result.error.as_error()
        if result.exit_code < 0:
            raise TransientError(f"{self.module} was ended by signal {-result.exit_code}. Run the same command again to resume.")
        if result.exit_code != EXIT_DONE:
            raise SlipwayError(f"{self.module} ended with exit code {result.exit_code}. The end of its log:\n{result.log_tail}")
        if result.artifact is not None:
            shutil.rmtree(self.job.output_dir, ignore_errors=True)
            self.store.fetch_to(result.artifact, self.job.output_dir, no_weights)

    def _found_whole(self) -> Result | None:
        """The step's output, which another driver has brought home and cleared up after."""
        slot = Path(self.base).name
        return Result(exit_code=EXIT_DONE, artifact=slot) if not self.part and self.store.manifest(slot) is not None else None

    def _push_inputs(self, job: object) -> tuple[dict[str, str], dict[str, str]]:
        """Pushes what the job reads below the home; artifacts by name, and other files by path."""
        written = {self.job.output_dir, self.job.progress_file, self.job.tracking.unsent_file if self.job.tracking else None}
        artifacts: dict[str, str] = {}
        files: dict[str, str] = {}
        for path in dict.fromkeys(_paths(job)):
            top, *rest = Path(path).parts
            place = self.home / path
            if place in written:
                continue
            if top == ARTIFACTS and (self.home / ARTIFACTS / rest[0] / MANIFEST_NAME).is_file():
                artifacts[rest[0]] = self.store.push(self.home / ARTIFACTS / rest[0]).digest
            elif place.exists():
                files |= orders.pushed_files(self.store, self.home, place)
        output = f"{self.job.output_dir.relative_to(self.home).as_posix()}/"
        return artifacts, {path: sha256 for path, sha256 in files.items() if not path.startswith(output)}

    def _push_outside(self, place: Path, target: str) -> dict[str, str]:
        if place.is_file():
            return {target: self.store.push_file(place)}
        found = [path for path in sorted(place.rglob("*")) if path.is_file()]
        return {f"{target}/{path.relative_to(place).as_posix()}": self.store.push_file(path) for path in found}


def _place_of(output_dir: Path, home: Path) -> tuple[str, str]:
    """Folder of the order in the store, such as `staging/<slot>`, and what tells programs of one slot apart. Raises ArtifactError."""
    top, slot, *rest = output_dir.relative_to(home).parts if output_dir.is_relative_to(home) else ("", "")
    if top not in ORDER_PLACES:
        raise ArtifactError(
            f"{output_dir}: a program on another machine writes below {' or '.join(ORDER_PLACES)} in SLIPWAY_HOME, which is {home}. "
            "Choose a folder there."
        )
    return f"{top}/{slot}", "-".join(rest[1:] if rest[:1] == ["output"] else rest)


def _paths(value: object) -> Iterator[str]:
    """The paths in a packed job, below the home."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str) and value.startswith(HOME):
        yield value.removeprefix(HOME)


def _outside(job: Job) -> Iterator[tuple[str, str]]:
    """Inputs of the driver's machine that lie outside its home, as the job has them, and as the other machine finds them."""
    for value, mark in travelling(job):
        if mark == STAYS:
            continue
        kind, path = ("file:", value.removeprefix("file:")) if value.startswith("file:") else ("", value)
        place = Path(path).expanduser()
        if place.is_absolute() and place.exists():
            stamp = [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in (sorted(place.rglob("*")) or [place])]
            yield value, f"{kind}{HOME}{INPUTS}/{sha256_json(stamp)[:16]}/{place.name}"


def _replaced(value: object, names: Mapping[str, str | None]) -> object:
    """JSON with each string that is one of `names` replaced."""
    if isinstance(value, dict):
        return {key: _replaced(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value
