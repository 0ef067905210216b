"""Every known shape of row gives the same messages; everything else is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError
from training.config import DataConfig, DataSource, RowsJob
from training.data import sources
from training.data.formats import detect_format, to_messages
from training.data.reading import RowReader
from training.data.rows import DIGEST_BYTES, Scan, choose_heldout, prepare_rows

ASKED, ANSWERED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
GOOD = {"messages": [ASKED, ANSWERED]}
SAME_ROW = {
    "messages": GOOD,
    "prompt_completion": {"prompt": "hi", "completion": "ho"},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
}


def read_rows(path: Path, format_name: str) -> list[dict[str, Any]]:
    return list(RowReader(DataSource(path=str(path)), format_name))


@pytest.mark.parametrize("name", SAME_ROW)
def test_format_each_known_shape_is_detected_and_gives_the_same_messages(name: str) -> None:
    assert detect_format(SAME_ROW[name]) == name
    assert to_messages(SAME_ROW[name], name) == [ASKED, ANSWERED]


def test_format_alpaca_with_input_puts_it_below_the_instruction() -> None:
    messages = to_messages({"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"}, "alpaca")
    assert [message["content"] for message in messages] == ["be brief", "add\n\n1 2", "3"]


def test_format_prompt_of_messages_is_kept_as_messages() -> None:
    row = {"prompt": [{"role": "system", "content": "s"}, ASKED], "completion": [ANSWERED]}
    assert to_messages(row, "prompt_completion") == [{"role": "system", "content": "s"}, ASKED, ANSWERED]


def test_format_unknown_keys_name_all_known_formats() -> None:
    with pytest.raises(ConfigError, match="known format") as caught:
        detect_format({"words": "hello"})
    for name in SAME_ROW:
        assert name in caught.value.message


BAD_LINES: dict[str, tuple[Any, str]] = {
    "not json": ('{"messages": [', "not JSON"),
    "a list": ("[1, 2]", "an object is needed"),
    "no assistant": ({"messages": [ASKED]}, "no assistant turn"),
    "bad role": ({"messages": [{"role": "robot", "content": "x"}, ANSWERED]}, "'robot'"),
    "content not text": ({"messages": [{"role": "user", "content": 3}, ANSWERED]}, "message 0 (user)"),
    "empty answer": ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, "message 1 (assistant)"),
    "no messages": ({"messages": []}, "at least one message"),
    "messages a text": ({"messages": "hello"}, "at least one message"),
    "message a text": ({"messages": ["hello"]}, "message 0 is str"),
    "other format": ({"prompt": "a", "completion": "b"}, "no 'messages'"),
    "tools not objects": ({**GOOD, "tools": ["t"]}, "'tools'"),
    "slice a number": ({**GOOD, "slice": 4}, "'slice'"),
    "language a number": ({**GOOD, "language": 4}, "'language'"),
    "half a surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not UTF-8"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_rows_bad_line_is_reported_with_file_and_line(name: str, tmp_path: Path) -> None:
    line, expected = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", line if isinstance(line, str) else json.dumps(line), json.dumps(GOOD)]))
    with pytest.raises(ConfigError) as caught:
        read_rows(path, "auto")
    assert f"{path}:3: " in caught.value.message
    assert expected in caught.value.message


def test_rows_bytes_that_are_no_text_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: not UTF-8"):
        read_rows(path, "auto")


def test_rows_several_problems_come_in_one_error_and_at_most_twenty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") + "nonsense\n" * 30)
    with pytest.raises(ConfigError) as caught:
        read_rows(path, "auto")
    assert caught.value.message.count("not JSON") == 20
    assert "stopped after 20" in caught.value.message


def test_rows_line_over_the_limit_is_refused_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 200)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + "x" * 1000 + "\nnonsense\n")
    with pytest.raises(ConfigError) as caught:
        read_rows(path, "auto")
    assert f"{path}:2: longer than 200 bytes" in caught.value.message
    assert f"{path}:3: not JSON" in caught.value.message


def test_rows_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(tmp_path / "none.jsonl", "auto")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no rows"):
        read_rows(tmp_path / "empty.jsonl", "auto")


def test_rows_named_format_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match="no 'instruction'"):
        read_rows(tmp_path / "rows.jsonl", "alpaca")


def scan(count: int) -> Scan:
    digests = b"".join(number.to_bytes(DIGEST_BYTES, "big") for number in range(count))
    return Scan(RowReader(DataSource(path="rows.jsonl")), bytearray(digests), bytearray([1] * count), bytearray([1] * count))


def test_split_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    train, again, other = scan(50), scan(50), scan(50)
    (heldout,) = choose_heldout([train], 0.2, 7)
    assert choose_heldout([again], 0.2, 7)[0].is_kept == heldout.is_kept
    assert again.is_kept == train.is_kept
    assert choose_heldout([other], 0.2, 8)[0].is_kept != heldout.is_kept
    assert heldout.num_kept == 10
    assert sorted([*train.kept, *heldout.kept]) == list(range(50))


def test_split_one_row_is_refused_and_two_give_one_each() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        choose_heldout([scan(1)], 0.5, 0)
    train = scan(2)
    assert [choose_heldout([train], 0.01, 0)[0].num_kept, train.num_kept] == [1, 1]


def test_rows_found_in_both_splits_leave_training_and_are_counted(tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "else"}, ANSWERED], "slice": "s"}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in (GOOD, other, GOOD)))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({**GOOD, "slice": "seen"}))
    job = RowsJob(output_dir=tmp_path / "out", train=tmp_path / "train.jsonl", heldout=tmp_path / "heldout.jsonl")
    prepare_rows(job)
    assert [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()] == [other]
    summary = json.loads((tmp_path / "out/rows.json").read_text())
    assert summary["train_rows_removed_as_heldout"] == 2
    assert summary["heldout_slices"] == {"seen": 1}
    assert [(source["format"], source["rows"], source["used"]) for source in summary["sources"]] == [("messages", 3, 1)]


def test_rows_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match="none of 1 training rows"):
        prepare_rows(RowsJob(output_dir=tmp_path / "out", train=path, heldout=path, data=DataConfig(format="messages")))
    assert not (tmp_path / "out").exists()
