"""`python -m training.data.render --config F`: rows as token ids and labels, with the receipt.

- The base model's own chat template renders; only assistant turns are supervised, each up to and including its stop token.
- A row whose labels cannot be placed exactly is dropped and counted, never bent: see `DROP_REASONS`.
- No row is ever truncated, and no more than a few blocks of rows are in memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infra.answers import Prompt, write_prompts
from infra.chat import load_codec
from infra.contracts import verify, write_manifest
from infra.files import read_json, write_json_atomic
from infra.process import Progress, run_program
from training.config import RenderJob
from training.data.blocks import PREVIEW_ROWS, Rendered, line_blocks
from training.data.parallel import block_rendering, choose_num_workers
from training.data.receipt import Receipt, check_losses
from training.data.rows import HELDOUT_NAME, SUMMARY_NAME, TRAIN_NAME
from training.data.tokens import TokenWriter
from training.folders import fresh_folder

RECEIPT_NAME = "receipt.json"
PREVIEW_NAME = "preview.json"


def render(job: RenderJob) -> None:
    """Writes tokens, prompts, receipt and preview. Raises ConfigError where too many rows are lost."""
    base, dataset = verify(job.base_dir, ("base",)), verify(job.rows_dir, ("dataset",))
    assert base.model is not None
    max_tokens = min(job.data.max_tokens or base.model.context_tokens, base.model.context_tokens)
    fresh_folder(job.output_dir)
    receipts = {"train": Receipt(), "heldout": Receipt()}
    previews: list[Any] = []
    size_bytes = sum(entry.size_bytes for entry in dataset.files.values())
    with block_rendering(job.base_dir, max_tokens, choose_num_workers(job.data, size_bytes)) as render_blocks:
        train = render_blocks(line_blocks(job.rows_dir / TRAIN_NAME, job.train_limit_rows))
        deque(write_blocks(job, "train", train, receipts["train"], previews), maxlen=0)
        heldout = render_blocks(line_blocks(job.rows_dir / HELDOUT_NAME, with_prompts=True))
        write_prompts(job.output_dir, write_blocks(job, "heldout", heldout, receipts["heldout"], previews))
    check_losses(receipts, job.data.max_lost_share, max_tokens)
    template_digest = load_codec(job.base_dir).template_digest
    facts = {"max_tokens": max_tokens, "template_digest": template_digest, **dataset_sources(job.rows_dir)}
    write_json_atomic(job.output_dir / RECEIPT_NAME, {**{split: each.summary() for split, each in receipts.items()}, **facts})
    write_json_atomic(job.output_dir / PREVIEW_NAME, previews[:PREVIEW_ROWS])
    write_manifest(job.output_dir, "tokens", job.provenance, parents={"base": base.digest, "dataset": dataset.digest})


def write_blocks(job: RenderJob, split: str, blocks: Iterable[Rendered], receipt: Receipt, previews: list[Any]) -> Iterator[Prompt]:
    """Writes each block as it comes and counts it in the receipt; gives its prompts, and adds the first previews to the list."""
    writer, progress = TokenWriter(job.output_dir, split), Progress(job.progress_file, f"{split} rows")
    for block in blocks:
        writer.write(block)
        receipt.add(Receipt(**json.loads(block.receipt)))
        progress.report(receipt.rows_read, receipt.rows_read)
        if len(previews) < PREVIEW_ROWS:
            previews += json.loads(block.previews)
        yield from map(Prompt.model_validate, json.loads(block.prompts))
    writer.close()


def dataset_sources(rows_dir: Path) -> dict[str, Any]:
    """Where a user's rows came from and in which format, for the receipt; a built-in dataset says nothing."""
    path = rows_dir / SUMMARY_NAME
    found = read_json(path) if path.is_file() else {}
    return {"sources": found["sources"]} if "sources" in found else {}


if __name__ == "__main__":
    run_program(RenderJob, render)
