"""Safetensors files written one tensor at a time, so that no model has to fit into memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.errors import ArtifactError, ConfigError
from infra.files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one tensor, known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class TensorWriter:
    """Takes the values of each tensor in the order of the specs."""

    def __init__(self, stream: BinaryIO, specs: Sequence[TensorSpec]) -> None:
        self._stream = stream
        self._waiting = list(reversed(specs))

    def write(self, name: str, values: bytes | memoryview) -> None:
        """Appends the values of the next tensor, row-major and little-endian."""
        self._take(name, memoryview(values).nbytes)
        self._stream.write(values)

    def copy(self, name: str, source: Path) -> None:
        """Appends the values of the next tensor from a file."""
        self._take(name, source.stat().st_size)
        with source.open("rb") as stream:
            shutil.copyfileobj(stream, self._stream)

    def _take(self, name: str, size: int) -> None:
        spec = self._waiting.pop()
        assert spec.name == name, f"{name} was written where {spec.name} is due"
        assert size == spec.num_bytes, f"{name}: {size} bytes given, {spec.num_bytes} declared"

    def close(self) -> None:
        """Checks that no tensor is missing."""
        assert not self._waiting, f"{len(self._waiting)} tensors were declared and not written"


@contextmanager
def safetensors_writer(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Iterator[TensorWriter]:
    """A writer of one safetensors file. Source: https://github.com/huggingface/safetensors#format."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of eight bytes
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        writer = TensorWriter(stream, specs)
        yield writer
        writer.close()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model folder, as its index gives them.

    Raises ConfigError where there are none, or where the index names one that is absent.
    """
    if not (folder / INDEX_NAME).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if names == [SINGLE_NAME]:
            return names
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5", ".safetensors"))
        raise ConfigError(
            f"{folder}: found {others or 'no weights'}; {SINGLE_NAME}, or shards with {INDEX_NAME}, is needed. "
            "Pickled weights are never read: save the model again with safetensors."
        )
    names = sorted(set(read_json(folder / INDEX_NAME)["weight_map"].values()))
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise ConfigError(f"{folder}: {INDEX_NAME} names {missing}, which are not in the folder. Fetch the model again.")
    return names


def tensor_specs(path: Path) -> list[TensorSpec]:
    """Specs of every tensor in a safetensors file, in the file's order. Raises ArtifactError where the header is damaged."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > 100_000_000:  # the bound of the format itself
                raise ValueError(f"header of {size} bytes")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        return [TensorSpec(name, entry["dtype"], tuple(entry["shape"])) for name, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a safetensors file ({error}). Fetch or convert the model again.") from error


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Size of all values."""
    return sum(spec.num_bytes for spec in specs)
