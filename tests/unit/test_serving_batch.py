"""Offline batches without Ray: rows and parts, requests, one worker with scripted engines, and the folder of answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from infra.errors import ConfigError, TransientError
from infra.provenance import Provenance
from serving.batch.answers import SCHEMA, Tally
from serving.batch.folder import BatchFolder, Manifest, Settings
from serving.batch.journal import Journal, JournalReader, Note
from serving.batch.parts import Part, Plan, make_plan
from serving.batch.reading import RowReader
from serving.batch.recovery import Keeper
from serving.batch.worker import Worker, make_gate
from serving.config import ServeConfig
from serving.engines.base import Chunk, EngineError, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.errors import ApiError
from serving.metrics import make_metrics
from serving.service import ServedModel, Service
from tests.unit.test_serving_api import byte_codec

LIMITS = ServeConfig(max_running_requests=4, max_body_bytes=2000)
POISON = "poison"
A = byte_codec().encode_text("A")


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(**batch: Any) -> Settings:
    given = {"rows_per_part": 128, "ignored_fields": (), "format": "jsonl", **batch}
    limits = {"max_tokens_limit": 2048, "default_max_tokens": 16, "max_body_bytes": LIMITS.max_body_bytes}
    return Settings(model_name="toy", model_digest="d", engine="openvino", weights="full", precision="f32", **limits, **given)


def read_all(plan: Plan, max_row_bytes: int = 10_000) -> list[Any]:
    reader = RowReader(max_row_bytes)
    return [row for part in plan.parts for row in reader.read(part)]


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


def answer_all(source: Path, folder: Path, make_engine: Callable[[], Any], **batch: Any) -> list[dict[str, Any]]:
    """The answers of one worker, whose parts all begin at once."""
    plan, what = make_plan(source, batch.get("rows_per_part", 128)), settings(**batch)

    def make() -> Service:
        engine = make_engine()
        gate = make_gate(LIMITS)
        model = ServedModel("toy", "fp_1", 5000, vocabulary_tokens=256, stop_ids=(7,), created_s=1)
        limits = LIMITS.model_copy(update={"default_max_tokens": what.default_max_tokens})
        return Service(model, engine, byte_codec(), limits, make_metrics("toy", engine, gate), gate)

    async def run() -> None:
        worker = Worker(Keeper(make), LIMITS, what, folder)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for part in plan.parts:
                group.create_task(worker.answer(part))

    asyncio.run(run())
    return answers(folder)


def test_plan_of_jsonl_covers_every_row_once_and_skips_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": str(number)}) for number in range(10)]
    (tmp_path / "b.jsonl").write_text("\n" + lines[0] + "\n \n" + "\r\n".join(lines[1:8]))
    (tmp_path / "c.ndjson").write_text("".join(line + "\n" for line in lines[8:]))
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "_batch.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "notes.txt").write_text("no request")
    plan = make_plan(tmp_path, rows_per_part=3)
    assert [(part.first_row, part.num_rows) for part in plan.parts] == [(0, 3), (3, 3), (6, 2), (8, 2)]
    assert [row["prompt"] for row in read_all(plan)] == [str(number) for number in range(10)]
    assert {name: file.num_rows for name, file in plan.files.items()} == {"a.jsonl": 0, "b.jsonl": 8, "c.ndjson": 2}
    assert plan.format == "jsonl"


def test_reader_of_lines_over_the_limit_gives_errors_and_reads_on(tmp_path: Path) -> None:
    wide = b" " * 3_000_000
    rows = [b'{"prompt": "%s"}' % (b"x" * 3_000_000), b'{"prompt": "next"}', wide, b'{"prompt": "last"}', wide + b'{"prompt": "x"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(rows))
    plan = make_plan(tmp_path / "in.jsonl", rows_per_part=8)
    found = read_all(plan, max_row_bytes=1000)
    assert [row.status if isinstance(row, ApiError) else row["prompt"] for row in found] == [413, "next", "last", 413]


def test_reader_of_parquet_reads_parts_in_any_order_across_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": [f"row {number}" for number in range(1000)], "seed": [None, 1] * 500})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=300)
    plan = make_plan(tmp_path / "in.parquet", rows_per_part=70)
    reader = RowReader(10_000)
    by_part = {part.number: list(reader.read(part)) for part in [*plan.parts[::3], *plan.parts[::-1]]}
    rows = [row for number in range(len(plan.parts)) for row in by_part[number]]
    assert [row["prompt"] for row in rows] == table["prompt"].to_pylist()
    assert rows[0] == {"prompt": "row 0"}
    assert rows[1] == {"prompt": "row 1", "seed": 1}
    assert plan.format == "parquet"


def test_reader_of_parquet_parses_json_columns_and_drops_what_a_row_lacks(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": None}}}]
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "tools": json.dumps(tools)},
        {"messages": [{"role": "user", "content": "b", "name": "Eve"}], "tools": None},
        {"messages": [], "tools": "{"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    first, second, bad = read_all(make_plan(tmp_path / "in.parquet", 8))
    assert first == {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    assert second == {"messages": [{"role": "user", "content": "b", "name": "Eve"}]}
    assert isinstance(bad, ApiError)
    assert bad.param == "tools"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("in.csv", "a,b", "a file .csv"),
        ("in.jsonl", "\n", "no rows"),
        ("in.parquet", "no", "not a Parquet file"),
        ("in/x.txt", "", "no such"),
    ],
)
def test_plan_of_input_that_holds_no_requests_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        make_plan(tmp_path / name.split("/")[0], 8)


BAD_ROWS: list[tuple[Any, int, str | None, str | None]] = [
    ("no object", 400, None, None),
    ({"custom_id": "a"}, 400, None, None),
    ({"prompt": "x", "messages": []}, 400, None, None),
    (chat("x", temperature=9), 400, "temperature", "invalid_value"),
    (chat("x", model="other"), 404, "model", "model_not_found"),
    (chat("x", label="good"), 400, "label", "unknown_parameter"),
    (chat("x" * 9000), 413, None, None),
    (chat("x", max_tokens=10**9), 400, None, "context_length_exceeded"),
    ({"prompt": ""}, 400, "prompt", None),
    ({"prompt": [999]}, 400, "prompt", "invalid_token_id"),
    ({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}, 400, "method", "invalid_value"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"prompt": "x"}}, 400, "url", "invalid_value"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}, 400, "prompt", "missing_required_parameter"),
    ({"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}, 400, "custom_id", "missing_required_parameter"),
]


def test_worker_bad_rows_are_error_rows_among_the_answers(tmp_path: Path) -> None:
    rows = [row for bad in BAD_ROWS for row in ({"prompt": "good", "id": 7}, bad[0])]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    found = answer_all(source, tmp_path / "out", lambda: ScriptedEngine(byte_codec().encode_text("yes")), rows_per_part=5)
    assert [row["row"] for row in found] == list(range(len(rows)))
    assert [(row["error"]["status"], row["error"]["param"], row["error"]["code"]) for row in found[1::2]] == [bad[1:] for bad in BAD_ROWS]
    assert all(row["error"]["message"] and row["error"]["type"] and row["text"] is None for row in found[1::2])
    assert {(row["text"], row["custom_id"], row["finish_reason"], row["error"]) for row in found[::2]} == {("yes", "7", "stop", None)}


def test_worker_answers_openai_batch_lines_in_their_own_format_too(tmp_path: Path) -> None:
    body = {"model": "toy", "prompt": "x", "n": 2}
    rows = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}, chat("hello"), {"prompt": "x", "logprobs": 1}]
    found = answer_all(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", lambda: ScriptedEngine(byte_codec().encode_text("yes")))
    assert found[0]["custom_id"] == "a"
    assert found[0]["response"]["status_code"] == 200
    assert [choice["text"] for choice in found[0]["response"]["body"]["choices"]] == ["yes", "yes"]
    assert found[0]["usage"] == {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7}
    assert (found[1]["text"], found[1]["response"]) == ("yes", None)
    assert found[2]["response"]["body"]["choices"][0]["logprobs"]["tokens"] == ["y", "e", "s"]


def test_worker_leaves_out_the_fields_that_are_to_be_ignored(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [chat("x", label="good", split="a")])
    (row,) = answer_all(source, tmp_path / "out", lambda: ScriptedEngine(A), ignored_fields=("label", "split"))
    assert (row["text"], row["error"]) == ("A", None)


def test_worker_writes_parquet_that_reads_as_one_table(tmp_path: Path) -> None:
    rows = [chat("x"), {"prompt": "", "id": "bad"}, {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    answer_all(source, tmp_path / "out", lambda: ScriptedEngine(A), format="parquet", rows_per_part=1)
    table = parquet.read_table(tmp_path / "out")
    assert table.schema.equals(SCHEMA)
    found = sorted(table.to_pylist(), key=lambda row: row["row"])
    assert [row["text"] for row in found] == ["A", None, "A"]
    assert found[1]["error"]["param"] == "prompt"
    assert json.loads(found[2]["response"])["body"]["choices"][0]["text"] == "A"


class MeetingEngine(ScriptedEngine):
    """Holds every answer back until `wanted` of them have come together, or all that there are."""

    def __init__(self, wanted: int, total: int) -> None:
        super().__init__(A)
        self._wanted, self._left = wanted, total
        self._met = asyncio.Event()
        self._num_here = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        self._num_here += 1
        met = self._met
        if self._num_here == min(self._wanted, self._left):
            self._left -= self._num_here
            self._num_here, self._met = 0, asyncio.Event()
            met.set()
        await met.wait()
        yield Chunk(A, "stop")


def test_worker_keeps_the_engine_full_across_the_ends_of_parts(tmp_path: Path) -> None:
    """Four rows must meet each time, though a part has three: a worker that finished one part first would wait for ever."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}] * 50)
    found = answer_all(source, tmp_path / "out", lambda: MeetingEngine(LIMITS.max_running_requests, 50), rows_per_part=3)
    assert [row["row"] for row in found] == list(range(50))
    assert {row["text"] for row in found} == {"A"}


class CountingEngine(ScriptedEngine):
    most = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().generate(prompt_ids, sampling)) as chunks:
            async for chunk in chunks:
                CountingEngine.most = max(CountingEngine.most, self.figures.num_running)
                yield chunk


def test_worker_gives_the_engine_no_more_than_it_may_run(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}] * 60)
    assert len(answer_all(source, tmp_path / "out", lambda: CountingEngine(A * 2), rows_per_part=7)) == 60
    assert CountingEngine.most == LIMITS.max_running_requests


class FragileEngine(ScriptedEngine):
    """Breaks, with all that it answers, soon after it is given a poisonous prompt."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        if byte_codec().decode(prompt_ids).startswith(POISON):
            self._failure = "the engine failed: poisoned"
        async with aclosing(super().generate(prompt_ids, sampling)) as chunks:
            async for chunk in chunks:
                yield chunk


def test_worker_row_that_brings_the_engine_down_is_an_error_row_and_all_others_are_answered(tmp_path: Path) -> None:
    prompts = ["good"] * 30
    prompts[3] = prompts[17] = POISON
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    found = answer_all(source, tmp_path / "out", lambda: FragileEngine(byte_codec().encode_text("fine")), rows_per_part=4)
    assert [row["row"] for row in found if row["error"]] == [3, 17]
    assert {row["error"]["code"] for row in found if row["error"]} == {"engine_failed"}
    assert "poisoned" in found[3]["error"]["message"]
    assert {row["text"] for row in found if not row["error"]} == {"fine"}


def test_worker_engine_that_fails_on_everything_ends_the_run_without_a_part(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}] * 20)
    with pytest.raises(ExceptionGroup) as caught:
        answer_all(source, tmp_path / "out", lambda: ScriptedEngine(A, fails_after=0), rows_per_part=5)
    error = caught.value.exceptions[0]
    assert isinstance(error, EngineError)
    assert "as scripted" in error.message
    assert answers(tmp_path / "out") == []


def manifest(plan: Plan, **batch: Any) -> Manifest:
    return Manifest(input=plan.files, settings=settings(**batch), provenance=Provenance())


def test_folder_of_another_input_or_setting_is_refused_with_what_changed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}])
    folder = BatchFolder(tmp_path / "out")
    with folder.locked():
        folder.begin(manifest(make_plan(source, 8)))
        folder.begin(manifest(make_plan(source, 8)))
        with pytest.raises(ConfigError, match="settings rows_per_part: was 128, is 9"):
            folder.begin(manifest(make_plan(source, 9), rows_per_part=9))
        write_jsonl(source, [{"prompt": "y"}, {"prompt": "z"}])
        with pytest.raises(ConfigError, match=r"input in.jsonl num_rows: was 1, is 2\n.*in.jsonl sha256"):
            folder.begin(manifest(make_plan(source, 8)))


def test_folder_that_holds_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(ConfigError, match="not answers of a batch"), BatchFolder(tmp_path).locked():
        pass


def test_folder_of_a_running_batch_keeps_a_second_one_out(tmp_path: Path) -> None:
    with BatchFolder(tmp_path / "out").locked(), pytest.raises(TransientError, match="another run"), BatchFolder(tmp_path / "out").locked():
        pass


def test_folder_part_counts_as_done_only_with_its_file_and_its_note(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "out")
    parts = [Part(number, "in.jsonl", 0, number, 1) for number in range(4)]
    with folder.locked():
        journal = Journal(folder.work)
        journal.write([Note(0, Tally(1, 0, 2, 3), True), Note(1, Tally(1, 1, 0, 0), False), Note(2, Tally(1), True)])
        with next(folder.work.glob("*.jsonl")).open("a") as stream:
            stream.write('{"part": 3, "is_done": tr')
        for number in (0, 1, 3):
            folder.part_file(parts[number], settings()).write_text("")
        assert folder.done(parts, settings()) == {0: Tally(1, 0, 2, 3)}
        assert folder.done(parts, settings()) == {0: Tally(1, 0, 2, 3)}, "the notes are kept when journals are gathered"


def test_journal_reader_sees_the_newest_note_of_each_part_and_waits_for_whole_lines(tmp_path: Path) -> None:
    one, other, reader = Journal(tmp_path), Journal(tmp_path), JournalReader(tmp_path)
    one.write([Note(0, Tally(5), False)])
    reader.look()
    one.write([Note(0, Tally(8), True)])
    other.write([Note(1, Tally(2), False)])
    path = next(tmp_path.glob("*.jsonl"))
    whole = path.read_text()
    path.write_text(whole[:-4])
    reader.look()
    path.write_text(whole)
    reader.look()
    assert {number: (note.tally.rows, note.is_done) for number, note in reader.notes.items()} == {0: (8, True), 1: (2, False)}
