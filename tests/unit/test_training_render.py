"""Labels lie on the answers and their stop tokens, and nowhere else; what cannot be labelled exactly is dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.answers import read_prompts
from infra.chat import ChatCodec, compile_template, load_codec
from infra.contracts import ModelFacts, read_manifest
from infra.errors import ConfigError
from training.config import DataConfig, RenderJob, RowsJob
from training.data.receipt import Receipt
from training.data.render import make_prompt, preview, render, render_rows
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
    prompt = make_prompt(codec, {**SEVERAL_TURNS, "slice": "x"}, row)
    assert list(prompt.ids) == codec.encode(SEVERAL_TURNS["messages"][:-1], add_generation_prompt=True)
    assert (prompt.expected, prompt.slice) == ("off", "x")


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
