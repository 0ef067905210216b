"""Labels lie on the answers and their stop tokens, and nowhere else; what cannot be labelled exactly is dropped and counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from infra.answers import read_prompts
from infra.chat import ChatCodec, compile_template, load_codec
from infra.contracts import ModelFacts, read_manifest
from infra.errors import ConfigError
from training.config import DataConfig, RenderJob, RowsJob
from training.data.blocks import line_blocks
from training.data.labels import make_prompt, preview, render_rows
from training.data.parallel import LARGE_BYTES, choose_num_workers
from training.data.receipt import Receipt
from training.data.render import render
from training.data.rows import prepare_rows
from training.data.tokens import TokenRow, read_token_rows

ASKED, ANSWERED = {"role": "user", "content": "turn on"}, {"role": "assistant", "content": "lamp now"}
SEVERAL_TURNS = {"messages": [{"role": "system", "content": "s"}, ASKED, ANSWERED, ASKED, {"role": "assistant", "content": "off"}]}


@pytest.fixture(scope="module")
def codec(toy_base: Path) -> ChatCodec:
    return load_codec(toy_base)


@pytest.fixture(scope="module")
def facts(toy_base: Path) -> ModelFacts:
    model = read_manifest(toy_base).model
    assert model is not None
    return model


def with_template(codec: ChatCodec, text: str) -> ChatCodec:
    return ChatCodec(codec.tokenizer, compile_template(text), text, codec.special_tokens)


def kept(codec: ChatCodec, facts: ModelFacts, row: dict[str, Any]) -> TokenRow:
    ((_, tokens),) = render_rows(codec, [row], facts, 256, Receipt())
    return tokens


def dropped(codec: ChatCodec, facts: ModelFacts, row: dict[str, Any], max_tokens: int = 256) -> dict[str, int]:
    receipt = Receipt()
    assert len(list(render_rows(codec, [row], facts, max_tokens, receipt))) == receipt.rows_kept
    return receipt.rows_dropped


def test_mask_covers_each_answer_with_its_stop_token_and_not_the_newline_after(codec: ChatCodec, facts: ModelFacts) -> None:
    row = kept(codec, facts, SEVERAL_TURNS)
    pieces = preview(codec, row)
    assert [text for text, supervised in pieces if supervised] == ["lamp now<|im_end|>", "off<|im_end|>"]
    assert "".join(text for text, _ in pieces) == codec.render(SEVERAL_TURNS["messages"])
    assert pieces[-1] == ("\n", False)


def test_prompt_is_the_row_up_to_its_last_answer(codec: ChatCodec, facts: ModelFacts) -> None:
    row = kept(codec, facts, SEVERAL_TURNS)
    prompt = make_prompt(codec, {**SEVERAL_TURNS, "slice": "x", "language": "de"}, row)
    assert list(prompt.ids) == codec.encode(SEVERAL_TURNS["messages"][:-1], add_generation_prompt=True)
    assert (prompt.expected, prompt.slice, prompt.language) == ("off", "x", "de")
    assert codec.tokenizer.decode(list(prompt.expected_ids), skip_special_tokens=False) == "off<|im_end|>"


def test_row_longer_than_the_limit_is_dropped_and_counted(codec: ChatCodec, facts: ModelFacts) -> None:
    length = len(codec.encode(SEVERAL_TURNS["messages"]))
    assert dropped(codec, facts, SEVERAL_TURNS, length - 1) == {"too_long": 1}
    assert dropped(codec, facts, SEVERAL_TURNS, length) == {}


def test_row_whose_answer_melts_into_the_prompt_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "turn the la"}, {"role": "assistant", "content": "mp"}]}
    assert dropped(with_template(codec, template), facts, row) == {"template_boundary": 1}


def test_row_with_an_earlier_answer_rewritten_by_the_template_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert dropped(with_template(codec, template), facts, SEVERAL_TURNS) == {"template_boundary": 1}


def test_row_without_a_stop_token_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert dropped(with_template(codec, template), facts, SEVERAL_TURNS) == {"no_stop_token": 1}


def test_row_with_a_stop_token_inside_an_answer_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "lamp<|im_end|>now"}]}
    assert dropped(codec, facts, row) == {"stop_token_inside": 1}


def test_row_that_the_template_refuses_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    template = "{{ raise_exception('users only') }}"
    assert dropped(with_template(codec, template), facts, SEVERAL_TURNS) == {"template_refused": 1}


def test_text_that_the_tokenizer_strips_to_nothing_is_dropped(codec: ChatCodec, facts: ModelFacts) -> None:
    stripping = Tokenizer.from_str(codec.tokenizer.to_str())
    stripping.normalizer = normalizers.Strip()
    own = ChatCodec(stripping, codec.template, codec.template_text, codec.special_tokens)
    assert dropped(own, facts, {"text": "  "}) == {"nothing_to_learn": 1}
    assert kept(own, facts, {"text": " on"}).supervised[1:] == (True,) * (len(own.encode_text("on")))


def test_render_nothing_kept_is_refused_whatever_share_may_be_lost(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    rows = toy_tokens.parent / "rows"
    job = RenderJob(output_dir=tmp_path / "out", base_dir=toy_base, rows_dir=rows, data=DataConfig(max_tokens=8, max_lost_share=1.0))
    with pytest.raises(ConfigError, match="45 of 45 rows lost: 45 too_long"):
        render(job)


def test_no_row_is_cut_and_each_that_is_trained_on_has_a_labelled_stop_token(toy_base: Path, toy_tokens: Path, tmp_path: Path) -> None:
    """Limits around the lengths that occur: a row is there whole or not at all, so a mask never comes out empty."""
    whole = {row.row: row for row in read_token_rows(toy_tokens, "train")}
    lengths = sorted(len(row.ids) for row in whole.values())
    limit = lengths[len(lengths) // 2]
    data = DataConfig(max_tokens=limit, max_lost_share=1.0)
    render(RenderJob(output_dir=tmp_path / "out", base_dir=toy_base, rows_dir=toy_tokens.parent / "rows", data=data))
    rows = list(read_token_rows(tmp_path / "out", "train"))
    assert rows == [row for row in whole.values() if len(row.ids) <= limit]
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())["train"]
    assert (receipt["rows_read"], receipt["rows_kept"], receipt["rows_truncated"]) == (45, len(rows), 0)
    assert receipt["rows_dropped"] == {"too_long": 45 - len(rows)}
    assert receipt["tokens_kept"] == sum(map(len, (row.ids for row in rows))) < receipt["tokens_read"] == sum(lengths)
    model = read_manifest(toy_base).model
    assert model is not None
    last_labelled = {row.ids[max(place for place, marked in enumerate(row.supervised) if marked)] for row in rows}
    assert last_labelled <= set(model.stop_ids)
    assert receipt["eos_coverage"] == 1.0


def test_receipt_counts_rows_tokens_and_stop_tokens(codec: ChatCodec, facts: ModelFacts) -> None:
    long_row = {"messages": [ASKED, {"role": "assistant", "content": "on " * 300}]}
    counts = Receipt()
    list(render_rows(codec, [SEVERAL_TURNS, long_row], facts, 256, counts))
    receipt = counts.summary()
    answers = codec.encode_text("lamp now<|im_end|>") + codec.encode_text("off<|im_end|>")
    assert receipt["rows_read"] == 2
    assert receipt["rows_kept"] == 1
    assert receipt["rows_dropped"] == {"too_long": 1}
    assert receipt["tokens_read"] > receipt["tokens_kept"] == len(codec.encode(SEVERAL_TURNS["messages"]))
    assert receipt["tokens_supervised"] == len(answers)
    assert receipt["eos_coverage"] == 1.0


def test_render_too_many_lost_rows_are_refused_with_the_counts(toy_base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, {"role": "assistant", "content": "on " * (5 if number else 300)}]} for number in range(10)]
    for name in ("train", "heldout"):
        different = [{"messages": [{"role": "user", "content": name}, *row["messages"]]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in different))
    prepare_rows(RowsJob(output_dir=tmp_path / "rows", train=tmp_path / "train.jsonl", heldout=tmp_path / "heldout.jsonl"))
    job = RenderJob(output_dir=tmp_path / "out", base_dir=toy_base, rows_dir=tmp_path / "rows")
    with pytest.raises(ConfigError) as caught:
        render(job)
    assert "train.jsonl: 1 of 10 rows lost: 1 too_long" in caught.value.message
    assert not (tmp_path / "out/manifest.json").exists()
    render(job.model_copy(update={"data": DataConfig(max_lost_share=0.2)}))
    assert json.loads((tmp_path / "out/receipt.json").read_text())["train"]["rows_dropped"] == {"too_long": 1}


def test_render_in_blocks_of_any_size_writes_the_same_bytes(
    toy_base: Path, toy_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(max_tokens=40, max_lost_share=1.0)  # some rows of most blocks are dropped
    for block_bytes in (1 << 20, 1, 300, 2000):  # all in one block; one row a block; two or three; ten
        monkeypatch.setattr("training.data.blocks.BLOCK_BYTES", block_bytes)
        render(RenderJob(output_dir=tmp_path / str(block_bytes), base_dir=toy_base, rows_dir=toy_tokens.parent / "rows", data=data))
        assert read_manifest(tmp_path / str(block_bytes)).files == read_manifest(tmp_path / str(1 << 20)).files
    dropped_rows = json.loads((tmp_path / "1/receipt.json").read_text())["train"]["rows_dropped"]
    assert 10 < dropped_rows["too_long"] < 40


def test_line_blocks_hold_every_line_once_and_stop_at_the_limit(toy_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_tokens.parent / "rows/train.jsonl"
    monkeypatch.setattr("training.data.blocks.BLOCK_BYTES", 1000)
    whole = path.read_bytes()
    blocks = list(line_blocks(path))
    assert b"".join(whole[block.start : block.start + block.size_bytes] for block in blocks) == whole
    assert [block.first_row for block in blocks] == [whole[: block.start].count(b"\n") for block in blocks]
    assert len(blocks) > 5
    limited = list(line_blocks(path, limit_rows=20))
    assert whole[: limited[-1].start + limited[-1].size_bytes].count(b"\n") == 20


def test_only_a_large_dataset_is_rendered_by_several_processes_unless_told_so() -> None:
    cores = len(os.sched_getaffinity(0))
    assert choose_num_workers(DataConfig(), LARGE_BYTES - 1) == 1
    assert choose_num_workers(DataConfig(), LARGE_BYTES) == cores
    assert choose_num_workers(DataConfig(num_workers=3), 1) == 3
    assert choose_num_workers(DataConfig(num_workers=1), LARGE_BYTES) == 1


def test_render_artifact_reads_back_as_the_rows_that_were_rendered(toy_base: Path, toy_tokens: Path) -> None:
    codec = load_codec(toy_base)
    lines = (toy_tokens.parent / "rows/train.jsonl").read_text().splitlines()
    rows = read_token_rows(toy_tokens, "train")
    assert len(rows) == len(lines) == 45
    for row in rows[:5]:
        assert list(row.ids) == codec.encode(json.loads(lines[row.row])["messages"])
    manifest = read_manifest(toy_tokens)
    assert manifest.parents == {"base": read_manifest(toy_base).digest, "dataset": read_manifest(toy_tokens.parent / "rows").digest}
    assert len(read_prompts(toy_tokens)) == 10
