"""A split of a dataset in blocks of lines: the unit that is rendered, here or by a worker, and written in order.

The blocks of a file depend on the file alone, and rendering a block on nothing but its lines, so who renders them changes no byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from infra.chat import load_codec
from infra.contracts import read_manifest
from infra.errors import ArtifactError
from training.data.labels import make_prompt, preview, render_rows
from training.data.receipt import Receipt
from training.data.tokens import TokenBlock, TokenRow, token_block

BLOCK_BYTES = 1 << 20
PREVIEW_ROWS = 3


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of one file."""

    path: str
    start: int
    """Byte at which the first one starts."""
    size_bytes: int
    first_row: int
    """Index of the first one in the file."""
    with_prompts: bool
    """Whether their prompts are wanted, which are those of held-out rows, and else previews."""


@dataclass(frozen=True)
class Rendered(TokenBlock):
    """What became of one block of lines; plain bytes and JSON texts, which cross to another process as they are."""

    receipt: str
    """Its part of the receipt."""
    prompts: str
    """Prompts of its rows, if they were wanted."""
    previews: str
    """Previews of its first rows."""


def line_blocks(path: Path, limit_rows: int | None = None, with_prompts: bool = False) -> Iterator[Lines]:
    """The first `limit_rows` lines of a dataset's file, in blocks that are full at `BLOCK_BYTES`. Raises ArtifactError without the file."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file, and a dataset artifact holds it. Make the dataset again.")
    start = size_bytes = first_row = row = 0
    with path.open("rb") as stream:
        for row, line in enumerate(islice(stream, limit_rows), start=1):
            size_bytes += len(line)
            if size_bytes >= BLOCK_BYTES:
                yield Lines(str(path), start, size_bytes, first_row, with_prompts)
                start, size_bytes, first_row = start + size_bytes, 0, row
    if size_bytes:
        yield Lines(str(path), start, size_bytes, first_row, with_prompts)


class Renderer:
    """Renders blocks for one base model, whose codec it loads once."""

    def __init__(self, base_dir: Path, max_tokens: int) -> None:
        model = read_manifest(base_dir).model
        assert model is not None
        self._codec, self._model, self._max_tokens = load_codec(base_dir), model, max_tokens

    def render(self, lines: Lines) -> Rendered:
        """One block."""
        with Path(lines.path).open("rb") as stream:
            stream.seek(lines.start)
            rows = (json.loads(line) for line in stream.read(lines.size_bytes).splitlines())
        receipt, kept = Receipt(), list[TokenRow]()
        prompts, previews = list[Any](), list[Any]()
        for row, tokens in render_rows(self._codec, rows, self._model, self._max_tokens, receipt, lines.first_row):
            kept.append(tokens)
            if lines.with_prompts:
                prompts += [make_prompt(self._codec, row, tokens).model_dump(mode="json")] if "messages" in row else []
            elif len(previews) < PREVIEW_ROWS:
                previews.append(preview(self._codec, tokens))
        block = token_block(kept)
        texts = (json.dumps(asdict(receipt)), json.dumps(prompts), json.dumps(previews))
        return Rendered(block.ids, block.supervised, block.lengths, block.rows, *texts)
