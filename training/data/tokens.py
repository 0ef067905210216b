"""Token rows on disk: flat arrays in one safetensors file a split."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import SafetensorError, safe_open

from infra.errors import ArtifactError
from training.weights import TensorSpec, safetensors_writer


@dataclass(frozen=True)
class TokenRow:
    """One row, ready to train on."""

    row: int
    """Index in the split's JSONL file."""
    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    """Whether each token is one the model must learn to write; as long as `ids`."""
    last_answer_start: int = 0
    """Position of the first token of the last answer; not stored."""


@dataclass(frozen=True)
class TokenBlock:
    """Some rows as they are written."""

    ids: bytes
    """int32 of every token."""
    supervised: bytes
    """uint8 of every token."""
    lengths: bytes
    """int64, tokens of each row."""
    rows: bytes
    """int64, index of each row in the split's JSONL file."""


def token_block(rows: Sequence[TokenRow]) -> TokenBlock:
    """`rows` in one block."""
    return TokenBlock(
        ids=b"".join(np.array(row.ids, dtype="<i4").tobytes() for row in rows),
        supervised=b"".join(np.array(row.supervised, dtype="u1").tobytes() for row in rows),
        lengths=np.array([len(row.ids) for row in rows], dtype="<i8").tobytes(),
        rows=np.array([row.row for row in rows], dtype="<i8").tobytes(),
    )


class TokenWriter:
    """Writes `<split>.safetensors` block by block: ids int32 and supervised uint8 (tokens,), offsets int64 (rows + 1,), rows int64 (rows,).

    Sizes stand in the file's header, so values wait in two files beside it until `close`.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._path = folder / f"{split}.safetensors"
        self._parts = {name: folder / f".{split}.{name}.partial" for name in ("ids", "supervised")}
        self._streams = {name: path.open("wb") for name, path in self._parts.items()}
        self._offsets, self._rows = array("q", [0]), array("q")

    def write(self, block: TokenBlock) -> None:
        """Appends the rows of a block."""
        self._streams["ids"].write(block.ids)
        self._streams["supervised"].write(block.supervised)
        self._offsets.extend((self._offsets[-1] + np.cumsum(np.frombuffer(block.lengths, dtype="<i8"))).tolist())
        self._rows.extend(np.frombuffer(block.rows, dtype="<i8").tolist())

    def close(self) -> None:
        """Puts the file together."""
        for stream in self._streams.values():
            stream.close()
        tokens, num_rows = self._offsets[-1], len(self._rows)
        specs = [
            TensorSpec("ids", "I32", (tokens,)), TensorSpec("offsets", "I64", (num_rows + 1,)), TensorSpec("rows", "I64", (num_rows,)),
            TensorSpec("supervised", "U8", (tokens,)),
        ]  # fmt: skip
        held = {"offsets": self._offsets, "rows": self._rows}
        with safetensors_writer(self._path, specs, {}) as writer:
            for spec in specs:
                if spec.name in held:
                    writer.write(spec.name, np.array(held[spec.name], dtype="<i8").tobytes())
                else:
                    writer.copy(spec.name, self._parts[spec.name])
        for path in self._parts.values():
            path.unlink()


class TokenRows(Sequence[TokenRow]):
    """The rows of one split, read from the mapped file when they are asked for, so that a corpus need not fit into memory."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="np") as stream:
            self._offsets, self._numbers = stream.get_tensor("offsets"), stream.get_tensor("rows")
        self._file: Any = safe_open(path, framework="np")
        self._ids, self._supervised = (self._file.get_slice(name) for name in ("ids", "supervised"))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...

    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        """One row, or the rows of a slice as a list."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        marks = self._supervised[start:end].astype(bool).tolist()
        return TokenRow(int(self._numbers[number]), tuple(self._ids[start:end].tolist()), tuple(marks))


def read_token_rows(folder: Path, split: str) -> TokenRows:
    """The rows of one split. Raises ArtifactError where the file is absent or damaged."""
    path = folder / f"{split}.safetensors"
    try:
        return TokenRows(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: no readable token rows ({error}). Run the step that renders the dataset again.") from error
