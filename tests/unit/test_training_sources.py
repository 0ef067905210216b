"""The same rows come out of every kind of file; sources are mixed by weight; tool calls and texts are rendered and labelled."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from infra.chat import ChatCodec, compile_template, load_codec
from infra.contracts import read_manifest
from infra.errors import ConfigError
from training.config import DataConfig, DataSource, RenderJob, RowsJob
from training.data.labels import preview, render_rows
from training.data.reading import RowReader, checked_row
from training.data.receipt import Receipt
from training.data.render import render
from training.data.rows import prepare_rows
from training.data.tokens import read_token_rows

ROWS = [{"instruction": f"say {number}, twice", "input": "", "output": f"{number}\n{number}"} for number in range(2500)]
CALL = {"name": "lamp", "arguments": {"state": "on"}}
TOOL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments.state }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    return path


def write_folder(path: Path) -> Path:
    path.mkdir()
    for number in range(5):
        write_jsonl(path / f"train-{number:05d}-of-00005.jsonl", ROWS[number * 500 : number * 500 + 500])
    write_jsonl(path / "test-00000-of-00001.jsonl", ROWS[:3])
    return path


def write_saved(path: Path) -> Path:
    """As `datasets.DatasetDict.save_to_disk` writes it."""
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        folder = path / split
        folder.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=700)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": write_jsonl, "rows.csv": write_csv, "rows.parquet": write_parquet, "rows.json": write_json, "folder": write_folder,
    "saved": write_saved,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_source_of_each_kind_gives_the_same_rows_and_says_their_format(name: str, tmp_path: Path) -> None:
    reader = RowReader(DataSource(path=str(WRITERS[name](tmp_path / name))))
    assert list(reader) == [checked_row(row, "alpaca") for row in ROWS]
    assert reader.format == "alpaca"


@pytest.mark.parametrize("name", ["folder", "saved"])
def test_source_split_is_chosen_and_a_missing_one_is_named(name: str, tmp_path: Path) -> None:
    place = str(WRITERS[name](tmp_path / name))
    assert len(list(RowReader(DataSource(path=place, split="test")))) == 3
    if name == "saved":
        with pytest.raises(ConfigError, match=r"no split 'dev'; it has \['train', 'test'\]"):
            list(RowReader(DataSource(path=place, split="dev")))


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "ragged csv": ("a.csv", b"prompt,completion\nx,y\nx\n", "a.csv:3: not as many cells"),
    "csv not utf-8": ("a.csv", b"prompt,completion\nx,\xff\n", "not CSV in UTF-8"),
    "json of a number": ("a.json", b"3", "An array of objects is needed"),
    "json cut off": ("a.json", b'[{"text": "x"}', "not JSON"),
    "json row a list": ("a.json", b'[{"text": "x"}, [1]]', "a.json row 2: a JSON list"),
    "parquet cut off": ("a.parquet", b"PAR1nonsense", "not a Parquet file"),
    "arrow nonsense": ("a.arrow", b"nonsense", "not an Arrow stream"),
    "unknown suffix": ("a.xml", b"<rows/>", "a file .xml"),
    "text a number": ("a.jsonl", b'{"text": 3}', "'text' is 3"),
    "tool call without name": ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "a name and arguments"),
    "tool arguments a list": (
        "a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}', "an object is needed",
    ),
    "tools not json": ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}], "tools": "lamp"}', "'tools' is a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_source_that_cannot_be_read_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    file_name, content, said = BAD_FILES[name]
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(RowReader(DataSource(path=str(tmp_path / file_name))))
    assert said in caught.value.message
    assert str(tmp_path / file_name) in caught.value.message


def test_mix_by_weight_is_as_large_as_can_be_and_interleaved(tmp_path: Path) -> None:
    for name, count in (("a", 400), ("b", 100), ("c", 100)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{number}", "completion": name} for number in range(count)])
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "a1", "completion": "a"}])
    train = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1), ("c", 0.5))]
    prepare_rows(RowsJob(output_dir=tmp_path / "out", train=train, heldout=heldout))
    lines = (tmp_path / "out/train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    assert {name: answers.count(name) for name in "abc"} == {"a": 300, "b": 100, "c": 50}
    assert {name: answers[:45].count(name) for name in "abc"} == {"a": 30, "b": 10, "c": 5}
    assert len(set(lines)) == 450
    prepare_rows(RowsJob(output_dir=tmp_path / "again", train=train, heldout=heldout))
    assert (tmp_path / "again/train.jsonl").read_text().splitlines() == lines


def test_mix_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    paths = [str(write_jsonl(tmp_path / name, ROWS[:9])) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ConfigError, match=r"b\.jsonl'\] have no weight"):
        prepare_rows(RowsJob(output_dir=tmp_path / "out", train=[{"path": paths[0], "weight": 1}, paths[1]]))


def test_problems_of_all_sources_come_in_one_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError) as caught:
        prepare_rows(RowsJob(output_dir=tmp_path / "out", train=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert "a.jsonl:1" in caught.value.message
    assert "b.jsonl:1" in caught.value.message


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": None, "function": {**CALL, "arguments": '{"state": "on"}'}}]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "arguments": {"state": "on", "colour": None}}]},
    ],
    ids=["plain", "openai", "from a table"],
)
def test_tool_calls_in_each_form_are_rendered_and_supervised(answer: dict[str, Any], toy_base: Path) -> None:
    codec, model = load_codec(toy_base), read_manifest(toy_base).model
    assert model is not None
    own = ChatCodec(codec.tokenizer, compile_template(TOOL_TEMPLATE), TOOL_TEMPLATE, codec.special_tokens)
    row = checked_row({"messages": [{"role": "user", "content": "light"}, answer]}, "messages")
    ((_, tokens),) = render_rows(own, [row], model, 256, Receipt())
    assert [text for text, supervised in preview(own, tokens) if supervised] == ["lamp on<|im_end|>"]


def test_sharegpt_function_call_becomes_a_tool_call_and_tools_are_parsed() -> None:
    turns = [
        {"from": "human", "value": "light"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "done"}, {"from": "gpt", "value": "it is on"},
    ]  # fmt: skip
    row = checked_row({"conversations": turns, "tools": json.dumps([{"name": "lamp"}])}, "sharegpt")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert row["tools"] == [{"name": "lamp"}]


def test_messages_of_a_table_lose_the_fields_that_only_other_rows_have() -> None:
    empty = {"tool_calls": None, "name": None}
    row = checked_row({"messages": [{"role": "user", "content": "x", **empty}, {"role": "assistant", "content": "y", **empty}]}, "messages")
    assert row["messages"] == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def test_text_rows_are_learnt_whole_and_end_in_a_stop_token(toy_base: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"the lamp is {number}"} for number in range(4)])
    heldout = write_jsonl(tmp_path / "heldout.jsonl", ROWS[:2])
    prepare_rows(RowsJob(output_dir=tmp_path / "rows", train=texts, heldout=heldout))
    render(RenderJob(output_dir=tmp_path / "tokens", base_dir=toy_base, rows_dir=tmp_path / "rows"))
    codec, model = load_codec(toy_base), read_manifest(toy_base).model
    assert model is not None
    for number, row in enumerate(read_token_rows(tmp_path / "tokens", "train")):
        assert list(row.ids) == [*codec.encode_text(f"the lamp is {number}"), model.stop_ids[0]]
        assert list(row.supervised) == [False] + [True] * (len(row.ids) - 1)
    receipt = json.loads((tmp_path / "tokens/receipt.json").read_text())
    assert receipt["train"]["eos_coverage"] == 1.0
    assert receipt["sources"] == [{"path": str(texts), "format": "text", "rows": 4, "used": 4}]


def test_text_rows_alone_cannot_be_scored_and_are_refused(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "x"}, {"text": "y"}])
    with pytest.raises(ConfigError, match="name a heldout file"):
        prepare_rows(RowsJob(output_dir=tmp_path / "rows", train=texts))
    with pytest.raises(ConfigError, match="nothing could be scored"):
        prepare_rows(RowsJob(output_dir=tmp_path / "rows", train=texts, heldout=texts, data=DataConfig(format="text")))


def test_token_rows_are_read_from_the_file_one_by_one(toy_tokens: Path) -> None:
    rows = read_token_rows(toy_tokens, "train")
    assert len(rows) == 45
    assert rows[-1] == rows[44] == rows[40:][4]
    assert [row.row for row in rows] == list(range(45))
    with pytest.raises(IndexError):
        rows[45]
