"""Checkpoints: sharded, written beside the training, complete or absent, safetensors and JSON only.

They lie in `<place>/step-00000050/`. Each worker writes its own part of every tensor in a thread while training goes on; `checkpoint.json`,
with the digest of every file, comes last, so its presence means complete, on storage without renames too. A damaged one is passed over for
the one before it. Tensors are stored by parameter, so another number or layout of workers can go on from them. The newest few stay, and
beside them the one of the lowest held-out loss where `TrainState.best_step` names it.
Source: torch `distributed/checkpoint` (its safetensors storage, since its own format keeps pickled metadata).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import ConfigError, TransientError
from infra.filesystems import open_place
from training.layout import Layout
from training.parameters import TrainableParameters

STATE_NAME = "checkpoint.json"
OPAQUE = "opaque"


@dataclass
class TrainState:
    """What a run must know to go on as if it had never stopped; batches and dropout follow from the step."""

    step: int = 0
    """Optimizer steps done."""
    flat: dict[str, Tensor] = field(default_factory=dict)
    """Tensors with one element for each of the worker's trained elements: master values, moments."""
    opaque: dict[str, Tensor] = field(default_factory=dict)
    """Optimizer state of another shape, such as 8-bit blocks, which only the same layout can use again."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers: figures collected so far, optimizer step counts, loss scale."""
    best_step: int | None = None
    """The step whose checkpoint stays however old it grows; None where none does."""


class CheckpointStore:
    """The checkpoints of one run, at a local folder or any fsspec URL that every worker reaches."""

    def __init__(self, place: str, fingerprint: str, keep: int, layout: Layout, parameters: TrainableParameters) -> None:
        self._files, self._root = open_place(place)
        self._url = place if "://" in place else f"file://{Path(place).absolute()}"
        self._fingerprint, self._keep = fingerprint, keep
        self._layout, self._parameters = layout, parameters
        self._group = dist.new_group(backend="gloo") if layout.mesh else None  # a thread's collectives must not meet those of the steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copies the state and starts to write it; waits for the one before first. Every worker must call."""
        self.finish()
        self._pending = self._thread.submit(self._write, copy.deepcopy(state))

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any. Raises its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def load_latest(self) -> TrainState | None:
        """The newest whole checkpoint of the same run, None where there is none or where data, base or settings were others.

        Raises ConfigError where it was written by a layout of workers that this one cannot go on from.
        """
        chosen: list[Any] = [self._newest() if self._layout.rank == 0 else None]
        if self._layout.mesh:
            dist.broadcast_object_list(chosen, src=0)
        return self._read(*chosen[0]) if chosen[0] else None

    def clear(self) -> None:
        """Removes all of this run's checkpoints."""
        if self._layout.rank == 0 and self._files.exists(self._root):
            self._files.rm(self._root, recursive=True)

    def _write(self, state: TrainState) -> None:
        """In the thread: once every worker's files are there, the first one makes the checkpoint whole and removes old ones."""
        name = step_name(state.step)
        self._remove(name)
        dcp, url = _dcp(), f"{self._url}/{name}"
        try:
            dcp.save(self._named(state), storage_writer=_writer(url), process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:  # no subclass of Exception; holds what went wrong on each worker
            causes = {rank: str(cause) for rank, (cause, _) in error.failures.items()}
            raise TransientError(f"{url} could not be written, by worker: {causes}. Mend that; the same command resumes.") from error
        if self._layout.rank == 0:
            folder = f"{self._root}/{name}"
            facts = {"step": state.step, "fingerprint": self._fingerprint, "workers": self._layout.sizes, **state.facts}
            digests = {PurePath(path).name: self._digest(path) for path in self._files.ls(folder, detail=False)}
            self._files.pipe_file(f"{folder}/{STATE_NAME}", json.dumps({**facts, "sha256": digests}).encode())
            for old in self._names_to_remove(name, state.best_step):
                self._remove(old)

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        """Name and facts of the newest whole checkpoint of this run."""
        for name in self._names():
            facts = self._facts(name)
            if facts and facts["fingerprint"] == self._fingerprint:
                return name, facts
        return None

    def _named(self, state: TrainState) -> dict[str, Tensor]:
        """The state by parameter, each tensor a part of the whole; opaque ones by this worker's place in the model."""
        tensors = {f"{kind}/{name}": part for kind, flat in state.flat.items() for name, part in self._parameters.parts(flat).items()}
        return tensors | {f"{self._opaque_prefix()}{name}": tensor for name, tensor in state.opaque.items()}

    def _read(self, name: str, facts: dict[str, Any]) -> TrainState:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        with self._on_disk(name) as folder:
            return self._read_folder(HuggingFaceStorageReader(folder), name, facts)

    @contextlib.contextmanager
    def _on_disk(self, name: str) -> Iterator[str]:
        """A local folder with a checkpoint's files, fetched while it is needed where they are elsewhere."""
        if self._url.startswith("file://"):
            yield f"{self._root}/{name}"
            return
        with tempfile.TemporaryDirectory(prefix="slipway-checkpoint-") as folder:
            paths = self._files.find(f"{self._root}/{name}")  # file by file: an object store has no folders to get
            self._files.get(paths, [f"{folder}/{PurePath(path).name}" for path in paths])
            yield folder

    def _read_folder(self, reader: Any, name: str, facts: dict[str, Any]) -> TrainState:
        stored = reader.read_metadata().state_dict_metadata
        kinds = {key.partition("/")[0] for key in stored} - {OPAQUE}
        flat = {kind: torch.empty_like(self._parameters.master.data) for kind in kinds}
        prefix = self._opaque_prefix()
        sizes = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        if not sizes and any(key.startswith(OPAQUE) for key in stored):
            raise ConfigError(
                f"{self._url}/{name} was written by workers laid out as {facts['workers']}, and this optimizer's state cannot be cut anew. "
                "Go on with train.parallel as it was, or remove the checkpoints to start again."
            )
        opaque = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in sizes.items()}
        state = TrainState(facts["step"], flat, opaque, facts)
        _dcp().load(self._named(state), storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        return state

    def _opaque_prefix(self) -> str:
        places = "-".join(str(self._layout.place(name)) for name in ("pipeline", "shard", "tensor"))
        return f"{OPAQUE}/{places}/"

    def _names(self) -> list[str]:
        """Names of the checkpoints that were finished, newest first."""
        found = self._files.glob(f"{self._root}/step-*/{STATE_NAME}")
        return sorted((PurePath(path).parent.name for path in found), reverse=True)

    def _names_to_remove(self, newest: str, best_step: int | None) -> list[str]:
        """All but the last few up to `newest` and the best. What claims to be newer was damaged, or else training would be beyond it."""
        names = self._names()
        kept = [name for name in names if name <= newest][: self._keep]
        return [name for name in names if name not in (*kept, None if best_step is None else step_name(best_step))]

    def _digest(self, path: str) -> str:
        with self._files.open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _facts(self, name: str) -> dict[str, Any] | None:
        """What stands in a checkpoint's JSON, None where that or one of its files is damaged."""
        folder = f"{self._root}/{name}"
        try:
            facts: dict[str, Any] = json.loads(self._files.cat_file(f"{folder}/{STATE_NAME}"))
            is_whole = all(self._digest(f"{folder}/{file}") == digest for file, digest in facts["sha256"].items())
            return facts if is_whole and facts["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remove(self, name: str) -> None:
        if self._layout.rank == 0 and self._files.exists(f"{self._root}/{name}"):
            self._files.rm(f"{self._root}/{name}", recursive=True)


def step_name(step: int) -> str:
    """Name of the folder of one checkpoint."""
    return f"step-{step:08d}"


def _dcp() -> Any:
    """torch's checkpoint library, which takes a second to load; without its advice for single processes, which is what one worker is."""
    import torch.distributed.checkpoint

    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return torch.distributed.checkpoint


def _writer(url: str) -> Any:
    """DCP's safetensors writer, onto any file system that fsspec knows."""
    from torch.distributed.checkpoint._fsspec_filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(url, save_distributed=True)
    writer.fs = FileSystem()
    writer.path = writer.fs.init_path(url)
    return writer
