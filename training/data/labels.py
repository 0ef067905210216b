"""A row as token ids with labels, and what is shown of it; a row whose labels cannot be placed exactly is dropped and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from infra.answers import Prompt
from infra.chat import ChatCodec
from infra.contracts import ModelFacts
from infra.errors import ConfigError
from training.data.receipt import DroppedRow, Receipt, last_label
from training.data.tokens import TokenRow


def render_rows(
    codec: ChatCodec,
    rows: Iterable[Mapping[str, Any]],
    model: ModelFacts,
    max_tokens: int,
    receipt: Receipt,
    first_row: int = 0,
) -> Iterator[tuple[Mapping[str, Any], TokenRow]]:
    """Every row that can be rendered and labelled, with its tokens; the receipt counts these and the others.

    `first_row` is the index of the first one in its file.
    """
    for index, row in enumerate(rows, first_row):
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
        if len(ids) < 2:  # a tokenizer may strip a text of blanks to nothing
            raise DroppedRow("nothing_to_learn")
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
    expected_ids = tokens.ids[tokens.last_answer_start : last_label(tokens) + 1]
    expected = content if isinstance(content, str) and content else codec.decode(expected_ids[:-1])
    named = {key: row[key] for key in ("slice", "language") if key in row}
    prompt_ids = tokens.ids[: tokens.last_answer_start]
    return Prompt(row=tokens.row, ids=prompt_ids, expected=expected, expected_ids=expected_ids, **named)


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
