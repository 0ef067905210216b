"""Offline batches on a real, small model under a real Ray: the command, and the program that it starts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pyarrow import parquet

from infra.settings import child_environment
from serving.admission import Gate
from serving.config import ServeConfig
from serving.openai_api import build_api
from serving.opening import make_service
from tests.conftest import ToyAdapter, toy_row

TOOL = {"type": "function", "function": {"name": "set_lamp", "parameters": {"type": "object", "properties": {}}}}
LONG_ROWS, LONG_TOKENS, PART_ROWS = 320, 180, 16


def chat(number: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"turn the lamp {number} on"}], "max_tokens": 12, **more}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start_program(
    model: Path, source: Path, output: Path, place: Path, rows_per_part: int = PART_ROWS, **serve: Any
) -> subprocess.Popen[str]:
    """`python -m serving.batch`, in a session of its own as the command starts it."""
    job = {"output_dir": str(output), "model_dir": str(model), "model_name": "toy", "input": str(source)}
    job |= {"batch": {"rows_per_part": rows_per_part}, "serve": {"allow_unsigned": ["toy"], **serve}}
    place.mkdir(exist_ok=True)
    config = place / "batch.json"
    config.write_text(json.dumps({**job, "progress_file": str(place / "progress.jsonl")}))
    command = [sys.executable, "-m", "serving.batch", "--config", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment("serving"), start_new_session=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for the program, which must end well."""
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors


def part_files(output: Path) -> list[Path]:
    return sorted(output.glob("part-*"))


def answers(output: Path) -> list[dict[str, Any]]:
    """All rows of JSONL parts, in the order of their names."""
    return [json.loads(line) for path in part_files(output) for line in path.read_text().split("\n")[:-1]]


def result(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "_batch.json").read_text())["result"])


def processes_of(place: Path) -> list[str]:
    """Processes that still name a folder of this test, or lie below one that does."""
    found = [process for process in psutil.process_iter(["cmdline"]) if str(place) in " ".join(process.info["cmdline"] or [])]
    return [" ".join(process.info["cmdline"]) for process in found]


def long_rows(path: Path) -> Path:
    return write_rows(path, [chat(number, max_tokens=LONG_TOKENS, ignore_eos=True) for number in range(LONG_ROWS)])


def wait_for_parts(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while len(part_files(output)) < count:
        assert process.poll() is None, "it ended before the test could interrupt it"
        assert time.monotonic() < deadline_s, "no parts in time"
        time.sleep(0.01)


def server_answers(model: Path, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    """What the API in front of the model's engine answers, one request after another."""
    limits = ServeConfig(engine="torch")

    async def run() -> list[httpx.Response]:
        service = make_service(model, "toy", limits, Gate(limits.max_running_requests, limits.max_queued_requests))
        await service.engine.start()
        try:
            transport = httpx.ASGITransport(build_api(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return [await client.post(f"/v1/{path}", json={"model": "toy", **body}) for path, body in asked]
        finally:
            await service.engine.stop()

    return asyncio.run(run())


def test_batch_answers_are_those_of_the_server(toy_base: Path, tmp_path: Path) -> None:
    """With the engine that computes in 32 bits: in fewer, an answer given in company may fall the other way at a near tie."""
    bodies = [chat(number) for number in range(10)]
    bodies += [chat(1, tools=[TOOL]), chat(2, stop="a", max_tokens=24), chat(3, n=2), chat(4, logprobs=True, top_logprobs=2)]
    plain = [{"prompt": "lamp", "max_tokens": 9}, {"prompt": [5, 6, 7], "max_tokens": 24}, {"prompt": "lamp", "temperature": 7}]
    lines = [{"custom_id": f"id {number}", "method": "POST", "url": "/v1/chat/completions", "body": chat(number)} for number in range(3)]
    source = write_rows(tmp_path / "in.jsonl", [*bodies, *plain, *lines])
    finish(start_program(toy_base, source, tmp_path / "out", tmp_path / "place", rows_per_part=4, engine="torch"))
    found = answers(tmp_path / "out")
    assert [row["row"] for row in found] == list(range(20))
    asked = [("chat/completions", body) for body in bodies] + [("completions", body) for body in plain]
    asked += [("chat/completions", line["body"]) for line in lines]
    for row, response in zip(found, server_answers(toy_base, asked), strict=True):
        said = response.json()
        if row["error"]:
            assert row["error"] == {"status": response.status_code, **said["error"]}
            continue
        choice = said["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert (row["text"], row["finish_reason"], row["usage"]) == (text, choice["finish_reason"], said["usage"])
        if row["response"]:
            assert [without_logprobs(one) for one in row["response"]["body"]["choices"]] == [
                without_logprobs(one) for one in said["choices"]
            ]
    assert [row["row"] for row in found if row["error"]] == [16]
    assert [row["row"] for row in found if row["response"]] == [12, 13, 17, 18, 19]
    assert [row["custom_id"] for row in found[17:]] == ["id 0", "id 1", "id 2"]
    counted = result(tmp_path / "out")
    assert (counted["rows"], counted["errors"]) == (20, 1)
    assert counted["completion_tokens"] == sum(row["usage"]["completion_tokens"] for row in found if row["usage"])


@pytest.mark.slow
def test_batch_rows_are_answered_by_the_adapter_that_they_name(
    toy_base: Path, adapters_of: Callable[[Path], dict[str, ToyAdapter]], tmp_path: Path
) -> None:
    """The folder of answers is that of these adapters: another under the same name is refused."""
    adapters = adapters_of(toy_base)
    named = ["red", "toy:blue", "blue", "toy:red"] * 4
    bodies = [{"messages": toy_row(number)["messages"][:2], "max_tokens": 24, "model": name} for number, name in enumerate(named)]
    source = write_rows(tmp_path / "in.jsonl", [*bodies, chat(1), chat(1, model="green")])
    serve = {
        "engine": "torch",
        "allow_unsigned": ["toy", *adapters],
        "adapters": {name: str(each.folder) for name, each in adapters.items()},
    }
    finish(start_program(toy_base, source, tmp_path / "out", tmp_path / "place", **serve))
    found = answers(tmp_path / "out")
    for name, row in zip(named, found, strict=False):
        assert row["text"].startswith(adapters[name.removeprefix("toy:")].taught)
    alone, unknown = found[-2:]
    assert not any(alone["text"].startswith(each.taught) for each in adapters.values())
    assert unknown["error"]["code"] == "model_not_found"
    serve["adapters"] = {"red": serve["adapters"]["blue"], "blue": serve["adapters"]["blue"]}
    process = start_program(toy_base, source, tmp_path / "out", tmp_path / "place", **serve)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "settings adapters red: was" in errors


def without_logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with the tokens of its log-probabilities alone: the last digits depend on the company too."""
    likely = (choice["logprobs"] or {}).get("content") or []
    return {**choice, "logprobs": [token["token"] for token in likely]}


@pytest.mark.slow
def test_batch_lost_worker_of_two_is_replaced_and_every_row_is_answered_once(toy_quantized: Path, tmp_path: Path) -> None:
    source, output = long_rows(tmp_path / "in.jsonl"), tmp_path / "out"
    process = start_program(toy_quantized, source, output, tmp_path / "place", num_replicas=2)
    wait_for_parts(output, 2, process)
    below = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in below if "PartAnswerer" in child.name() + " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    finish(process)
    assert Counter(row["row"] for row in answers(output)) == Counter(range(LONG_ROWS))
    assert result(output)["completion_tokens"] == LONG_ROWS * LONG_TOKENS


def slipway(home: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "batch", *arguments, "--set", "serve.allow_unsigned=[quantized]"]
    environment = {**os.environ, "SLIPWAY_HOME": str(home)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_batch_killed_and_started_again_answers_what_is_missing_and_every_row_once(toy_quantized: Path, tmp_path: Path) -> None:
    source, output = long_rows(tmp_path / "in.jsonl"), tmp_path / "out"
    arguments = [str(toy_quantized), str(source), str(output), "--json", "--set"]
    process = slipway(tmp_path / "home", *arguments, f"batch.rows_per_part={PART_ROWS}")
    wait_for_parts(output, 3, process)
    (program,) = psutil.Process(process.pid).children()
    os.killpg(program.pid, signal.SIGKILL)  # all of it at once; what lived on could finish a part
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, ""), errors
    assert processes_of(tmp_path) == []
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in part_files(output)}
    assert 3 <= len(kept) < LONG_ROWS // PART_ROWS
    assert all(data.count(b"\n") == PART_ROWS for _, data in kept.values())

    process = slipway(tmp_path / "home", *arguments, f"batch.rows_per_part={PART_ROWS}")
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    told = json.loads(said)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept} == kept
    assert [row["row"] for row in answers(output)] == list(range(LONG_ROWS))
    assert told["rows_answered_now"] == LONG_ROWS - PART_ROWS * len(kept)
    assert (told["rows"], told["errors"], told["completion_tokens"]) == (LONG_ROWS, 0, LONG_ROWS * LONG_TOKENS)
    assert told["seconds"] > 0
    assert not list(output.glob(".*.partial"))
    assert not list((output / ".work").glob("*.jsonl"))

    process = slipway(tmp_path / "home", *arguments, f"batch.rows_per_part={PART_ROWS}")
    assert json.loads(process.communicate(timeout=60)[0])["rows_answered_now"] == 0
    process = slipway(tmp_path / "home", *arguments, f"batch.rows_per_part={PART_ROWS + 1}")
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (2, "")
    assert "rows_per_part: was 16, is 17" in errors


@pytest.mark.slow
def test_batch_stopped_by_ctrl_c_leaves_whole_parts(toy_quantized: Path, tmp_path: Path) -> None:
    source, output, home = long_rows(tmp_path / "in.jsonl"), tmp_path / "out", tmp_path / "home"
    arguments = [str(toy_quantized), str(source), str(output), "--format", "parquet", "--set", f"batch.rows_per_part={PART_ROWS}"]
    process = slipway(home, *arguments)
    wait_for_parts(output, 2, process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, ""), errors
    assert "the same command resumes" in errors
    assert processes_of(tmp_path) == []
    assert 2 <= len(part_files(output)) < LONG_ROWS // PART_ROWS
    assert all(parquet.read_metadata(path).num_rows == PART_ROWS for path in part_files(output))
    assert most_open_parts(output) >= 4, "an engine of 64 requests is kept full by several parts of 16"
    (log,) = (home / "runs").glob("*/progress.jsonl")
    progress = json.loads(log.read_text().splitlines()[-1])
    assert 0 < progress["done"] < progress["total"] == LONG_ROWS


def most_open_parts(output: Path) -> int:
    """The most parts that the one worker was answering at once, as the notes that it left say."""
    (journal,) = (output / ".work").glob("*.jsonl")
    is_open, most = set(), 0
    for note in map(json.loads, journal.read_text().splitlines()):
        (is_open.discard if note["is_done"] else is_open.add)(note["part"])
        most = max(most, len(is_open))
    return most


def test_batch_bad_input_exits_2_before_ray_starts(toy_quantized: Path, toy_base: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [chat(1)])
    bad: list[tuple[list[str], str]] = [
        ([str(toy_quantized), str(tmp_path / "absent.jsonl"), str(tmp_path / "out")], "no such file"),
        ([str(toy_base), str(source), str(tmp_path / "out")], "holds a 'base' artifact"),
        ([str(toy_quantized), str(tmp_path), str(tmp_path / "out")], "lies in"),
        ([str(toy_quantized), str(source), str(tmp_path / "out"), "--format", "csv"], "batch.format"),
        ([str(toy_quantized), str(source), str(tmp_path / "out"), "--set", "serve.pools=[{name: a}]"], "engines of one kind"),
        ([str(toy_quantized), str(source), str(tmp_path / "out"), "--set", "serve.adapters.red=folder"], "red (folder): "),
    ]
    for arguments, needed in bad:
        process = slipway(tmp_path / "home", *arguments)
        said, errors = process.communicate(timeout=60)
        assert (process.returncode, said) == (2, ""), errors
        assert needed in errors
    assert not (tmp_path / "out").exists()
