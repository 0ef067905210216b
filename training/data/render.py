"""`python -m training.data.render --config F`: rows as token ids and labels, with the receipt.

- The base model's own chat template renders; only assistant turns are supervised, each up to and including its stop token.
- A row whose labels cannot be placed exactly is dropped and counted, never bent: see `DROP_REASONS`.
- No row is ever truncated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.answers import Prompt, write_prompts
from infra.chat import ChatCodec, load_codec
from infra.contracts import ModelFacts, verify, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.files import write_json_atomic
from infra.process import Progress, run_program
from training.config import RenderJob
from training.data.rows import HELDOUT_NAME, TRAIN_NAME
from training.data.tokens import TokenRow, write_token_rows
from training.folders import fresh_folder

RECEIPT_NAME = "receipt.json"
PREVIEW_NAME = "preview.json"
PREVIEW_ROWS = 3
DROP_REASONS = {
    "too_long": "longer than max_tokens",
    "template_refused": "the chat template refuses the messages",
    "template_boundary": "the tokens of the prompt are not the first tokens of prompt and answer",
    "no_stop_token": "the template ends an answer without a stop token of the model",
    "stop_token_inside": "an answer holds a stop token in its middle",
}


class DroppedRow(ValueError):
    """A row that cannot be used; the text is one of `DROP_REASONS`."""


@dataclass
class Split:
    """The rows of one file: kept ones, and counts of the others."""

    rows_read: int = 0
    tokens_read: int = 0
    kept: list[TokenRow] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts one lost row."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    @property
    def lost_share(self) -> float:
        """Share of the rows read that were dropped."""
        return sum(self.dropped.values()) / max(self.rows_read, 1)


def render(job: RenderJob) -> None:
    """Writes tokens, prompts, receipt and preview. Raises ConfigError where too many rows are lost."""
    base, dataset = verify(job.base_dir, ("base",)), verify(job.rows_dir, ("dataset",))
    assert base.model is not None
    codec = load_codec(job.base_dir)
    max_tokens = min(job.data.max_tokens or base.model.context_tokens, base.model.context_tokens)
    splits: dict[str, Split] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, limit in ((TRAIN_NAME, job.train_limit_rows), (HELDOUT_NAME, None)):
        rows[name] = _load_rows(job.rows_dir / name)[:limit]
        splits[name] = render_split(codec, rows[name], base.model, max_tokens, Progress(job.progress_file, "rows"))
    check_losses(splits, job.data.max_lost_share, max_tokens)
    fresh_folder(job.output_dir)
    for name, split in splits.items():
        write_token_rows(job.output_dir, name.removesuffix(".jsonl"), split.kept)
    write_prompts(job.output_dir, [make_prompt(codec, rows[HELDOUT_NAME][kept.row], kept) for kept in splits[HELDOUT_NAME].kept])
    receipt = {name.removesuffix(".jsonl"): receipt_of(split, base.model.stop_ids) for name, split in splits.items()}
    write_json_atomic(job.output_dir / RECEIPT_NAME, {**receipt, "max_tokens": max_tokens, "template_digest": codec.template_digest})
    write_json_atomic(job.output_dir / PREVIEW_NAME, [preview(codec, row) for row in splits[TRAIN_NAME].kept[:PREVIEW_ROWS]])
    write_manifest(job.output_dir, "tokens", job.provenance, parents={"base": base.digest, "dataset": dataset.digest})


def render_split(
    codec: ChatCodec, rows: Sequence[Mapping[str, Any]], model: ModelFacts, max_tokens: int, progress: Progress | None = None
) -> Split:
    """Every row rendered and labelled, or counted as dropped."""
    split = Split()
    for index, row in enumerate(rows):
        split.rows_read += 1
        try:
            ids = codec.encode(row["messages"], row.get("tools"))
        except ConfigError:
            split.drop("template_refused")
            continue
        split.tokens_read += len(ids)
        try:
            split.kept.append(label_row(codec, row, index, ids, model.stop_ids, max_tokens))
        except DroppedRow as dropped:
            split.drop(str(dropped))
        if progress and index % 500 == 499:
            progress.report(index + 1, len(rows))
    return split


def label_row(
    codec: ChatCodec, row: Mapping[str, Any], index: int, ids: Sequence[int], stop_ids: Sequence[int], max_tokens: int
) -> TokenRow:
    """`ids` of the whole row with a label on each token of each answer, its stop token included. Raises DroppedRow."""
    if len(ids) > max_tokens:
        raise DroppedRow("too_long")
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


def check_losses(splits: Mapping[str, Split], max_lost_share: float, max_tokens: int) -> None:
    """Raises ConfigError where a split lost more rows than allowed, or all."""
    lines = []
    for name, split in splits.items():
        if split.lost_share > max_lost_share or not split.kept:
            reasons = [f"{count} {reason} ({DROP_REASONS[reason]})" for reason, count in sorted(split.dropped.items())]
            lines.append(f"  - {name}: {sum(split.dropped.values())} of {split.rows_read} rows lost: {', '.join(reasons)}")
    if lines:
        raise ConfigError(
            f"too many rows cannot be used with this model (max_tokens {max_tokens})\n" + "\n".join(lines) + "\n"
            f"At most a share of {max_lost_share} may be lost: mend those rows, or raise data.max_lost_share or data.max_tokens."
        )


def receipt_of(split: Split, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Counts of one split, for people and for gates."""
    kept_tokens = sum(len(row.ids) for row in split.kept)
    supervised = sum(sum(row.supervised) for row in split.kept)
    ends_in_stop = sum(row.ids[_last_label(row)] in stop_ids for row in split.kept)
    return {
        "rows_read": split.rows_read,
        "rows_kept": len(split.kept),
        "rows_dropped": dict(sorted(split.dropped.items())),
        "rows_truncated": 0,
        "tokens_read": split.tokens_read,
        "tokens_kept": kept_tokens,
        "tokens_supervised": supervised,
        "supervised_share": supervised / max(kept_tokens, 1),
        "eos_coverage": ends_in_stop / max(len(split.kept), 1),
        "longest_row_tokens": max((len(row.ids) for row in split.kept), default=0),
    }


def make_prompt(codec: ChatCodec, row: Mapping[str, Any], tokens: TokenRow) -> Prompt:
    """The held-out row up to its last answer, and that answer's text."""
    content = next(message for message in reversed(row["messages"]) if message["role"] == "assistant").get("content")
    answer_ids = tokens.ids[tokens.last_answer_start : _last_label(tokens)]
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


def _last_label(row: TokenRow) -> int:
    return max(place for place, labelled in enumerate(row.supervised) if labelled)


def _load_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file. A dataset artifact holds {TRAIN_NAME} and {HELDOUT_NAME}; make it again.")
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


if __name__ == "__main__":
    run_program(RenderJob, render)
