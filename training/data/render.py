"""`python -m training.data.render --config F`: rows as token ids and labels, with the receipt.

- The base model's own chat template renders; only assistant turns are supervised, each up to and including its stop token.
- A row whose labels cannot be placed exactly is dropped and counted, never bent: see `DROP_REASONS`.
- No row is ever truncated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from infra.answers import Prompt, write_prompts
from infra.chat import ChatCodec, load_codec
from infra.contracts import ModelFacts, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import read_json, write_json_atomic
from infra.process import Progress, run_program
from training.config import RenderJob
from training.data.receipt import DroppedRow, Receipt, check_losses, last_label
from training.data.rows import HELDOUT_NAME, SUMMARY_NAME, TRAIN_NAME
from training.data.tokens import TokenRow, TokenWriter
from training.folders import fresh_folder

RECEIPT_NAME = "receipt.json"
PREVIEW_NAME = "preview.json"
PREVIEW_ROWS = 3


def render(job: RenderJob) -> None:
    """Writes tokens, prompts, receipt and preview. Raises ConfigError where too many rows are lost."""
    base, dataset = verify(job.base_dir, ("base",)), verify(job.rows_dir, ("dataset",))
    assert base.model is not None
    codec = load_codec(job.base_dir)
    max_tokens = min(job.data.max_tokens or base.model.context_tokens, base.model.context_tokens)
    fresh_folder(job.output_dir)
    receipts = {"train": Receipt(), "heldout": Receipt()}
    prompts: list[Prompt] = []
    previews: list[Any] = []
    for split, name, limit in (("train", TRAIN_NAME, job.train_limit_rows), ("heldout", HELDOUT_NAME, None)):
        writer = TokenWriter(job.output_dir, split)
        rows = islice(stored_rows(job.rows_dir / name), limit)
        progress = Progress(job.progress_file, f"{split} rows")
        for row, tokens in render_rows(codec, rows, base.model, max_tokens, receipts[split], progress):
            writer.write(tokens)
            if split == "heldout" and "messages" in row:
                prompts.append(make_prompt(codec, row, tokens))
            elif split == "train" and len(previews) < PREVIEW_ROWS:
                previews.append(preview(codec, tokens))
        writer.close()
    check_losses(receipts, job.data.max_lost_share, max_tokens)
    write_prompts(job.output_dir, prompts)
    facts = {"max_tokens": max_tokens, "template_digest": codec.template_digest, **dataset_sources(job.rows_dir)}
    write_json_atomic(job.output_dir / RECEIPT_NAME, {**{split: each.summary() for split, each in receipts.items()}, **facts})
    write_json_atomic(job.output_dir / PREVIEW_NAME, previews)
    write_manifest(job.output_dir, "tokens", job.provenance, parents={"base": base.digest, "dataset": dataset.digest})


def render_rows(
    codec: ChatCodec,
    rows: Iterable[Mapping[str, Any]],
    model: ModelFacts,
    max_tokens: int,
    receipt: Receipt,
    progress: Progress | None = None,
) -> Iterator[tuple[Mapping[str, Any], TokenRow]]:
    """Every row that can be rendered and labelled, with its tokens; the receipt counts these and the others."""
    for index, row in enumerate(rows):
        receipt.rows_read += 1
        try:
            ids = _encode(codec, row, model)
        except ConfigError:
            receipt.drop("template_refused")
            continue
        receipt.tokens_read += len(ids)
        try:
            tokens = label_row(codec, row, index, ids, model.stop_ids, max_tokens)
        except DroppedRow as dropped:
            receipt.drop(str(dropped))
            continue
        receipt.keep(tokens, model.stop_ids)
        yield row, tokens
        if progress and index % 500 == 499:
            progress.report(index + 1, index + 1)


def _encode(codec: ChatCodec, row: Mapping[str, Any], model: ModelFacts) -> list[int]:
    """All token ids of a row. Raises ConfigError where the template refuses its messages."""
    if "text" in row:
        return [*codec.encode_text(row["text"]), model.stop_ids[0]]
    return codec.encode(row["messages"], row.get("tools"))


def label_row(
    codec: ChatCodec, row: Mapping[str, Any], index: int, ids: Sequence[int], stop_ids: Sequence[int], max_tokens: int
) -> TokenRow:
    """`ids` of the whole row with a label on each token of each answer, its stop token included; of a text on all that can be predicted.

    Raises DroppedRow.
    """
    if len(ids) > max_tokens:
        raise DroppedRow("too_long")
    if "text" in row:
        return TokenRow(index, tuple(ids), (False,) + (True,) * (len(ids) - 1))
    supervised = [False] * len(ids)
    last_start = 0
    for turn, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        last_start, end = _answer_span(codec, row, turn, ids, stop_ids)
        supervised[last_start:end] = [True] * (end - last_start)
    return TokenRow(index, tuple(ids), tuple(supervised), last_start)


def _answer_span(codec: ChatCodec, row: Mapping[str, Any], turn: int, ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, int]:
    """First and one past the last position of one answer within `ids`."""
    messages, tools = row["messages"], row.get("tools")
    try:
        prompt = codec.encode(messages[:turn], tools, add_generation_prompt=True)
        answered = ids if turn == len(messages) - 1 else codec.encode(messages[: turn + 1], tools)
    except ConfigError as error:
        raise DroppedRow("template_refused") from error
    start = len(prompt)
    if list(answered[:start]) != prompt:
        raise DroppedRow("template_boundary")
    stops = [place for place in range(start, len(answered)) if answered[place] in stop_ids]
    if not stops:
        raise DroppedRow("no_stop_token")
    if len(stops) > 1:
        raise DroppedRow("stop_token_inside")
    end = stops[0] + 1
    if list(ids[:end]) != list(answered[:end]):
        raise DroppedRow("template_boundary")
    return start, end


def make_prompt(codec: ChatCodec, row: Mapping[str, Any], tokens: TokenRow) -> Prompt:
    """The held-out row up to its last answer, and that answer's text."""
    content = next(message for message in reversed(row["messages"]) if message["role"] == "assistant").get("content")
    answer_ids = tokens.ids[tokens.last_answer_start : last_label(tokens)]
    expected = content if isinstance(content, str) and content else codec.decode(answer_ids)
    return Prompt(row=tokens.row, ids=tokens.ids[: tokens.last_answer_start], expected=expected, slice=row.get("slice", ""))


def preview(codec: ChatCodec, row: TokenRow) -> list[tuple[str, bool]]:
    """A row's text in pieces, each with whether it is supervised."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for place in range(1, len(row.ids) + 1):
        if place == len(row.ids) or row.supervised[place] != row.supervised[start]:
            text = codec.tokenizer.decode(list(row.ids[start:place]), skip_special_tokens=False)
            pieces.append((text, row.supervised[start]))
            start = place
    return pieces


def stored_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a dataset artifact, one after another. Raises ArtifactError where the file is absent."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file. A dataset artifact holds {TRAIN_NAME} and {HELDOUT_NAME}; make it again.")
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def dataset_sources(rows_dir: Path) -> dict[str, Any]:
    """Where a user's rows came from and in which format, for the receipt; a built-in dataset says nothing."""
    path = rows_dir / SUMMARY_NAME
    found = read_json(path) if path.is_file() else {}
    return {"sources": found["sources"]} if "sources" in found else {}


if __name__ == "__main__":
    run_program(RenderJob, render)
