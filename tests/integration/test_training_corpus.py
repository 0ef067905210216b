"""A corpus larger than the memory it is given: read, rendered and trained on in a few blocks, by one process or by Ray Data alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.contracts import read_manifest
from infra.errors import ConfigError
from infra.process import Job
from infra.settings import child_environment
from training.config import DataConfig, FinetuneJob, LoraConfig, RenderJob, RowsJob, TrainConfig
from training.data.render import render
from training.data.rows import prepare_rows

WORDS = ["turn", "the", "lamp", "on", "please", "now", "and", "answer", "with", "a", "colour"]
TRAIN_FEW_STEPS = "import sys\nfrom training.config import FinetuneJob\nfrom training.worker import run_worker\n" + (
    "run_worker(FinetuneJob.model_validate_json(sys.stdin.read()), [])"
)


def write_corpus(path: Path, num_rows: int, row_words: int) -> Path:
    """Rows that all differ; every fiftieth is longer than the toy's context of 256 tokens, the last of them at the very end."""
    with path.open("w") as stream:
        for number in range(num_rows):
            asked = [WORDS[(number + place) % len(WORDS)] for place in range(row_words)]
            answer = "on " * 300 if number % 50 == 49 else f"lamp {number % 7}"
            name = [WORDS[int(digit)] for digit in str(number)]  # in words: the tokenizer keeps each new one of the first ten thousand
            messages = [{"role": "user", "content": " ".join(name + asked)}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages, "slice": f"s{number % 2}"}) + "\n")
    return path


def dataset(folder: Path, num_rows: int, row_words: int) -> Path:
    source = write_corpus(folder / "rows.jsonl", num_rows, row_words)
    prepare_rows(RowsJob(output_dir=folder / "rows", train=source, heldout_share=0.1))
    return folder / "rows"


def render_job(output_dir: Path, base: Path, rows: Path, **data: Any) -> RenderJob:
    return RenderJob(output_dir=output_dir, base_dir=base, rows_dir=rows, data=DataConfig(**data))


@pytest.fixture
def killed_workers() -> Iterator[list[int]]:
    """Kills the first worker of Ray Data that is seen rendering; the list tells which."""
    killed: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not killed and not is_over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                if not killed and "ray::Map(_render_row)" in process.name() + " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    yield killed
    is_over.set()
    thread.join()


@pytest.mark.slow
def test_several_processes_and_one_that_is_killed_write_what_one_writes(
    toy_base: Path, tmp_path: Path, killed_workers: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = dataset(tmp_path, 20_000, 12)
    one, several = (render_job(tmp_path / str(count), toy_base, rows, max_lost_share=0.05, num_workers=count) for count in (1, 2))
    for job in (one, several):
        render(job)
    assert len(killed_workers) == 1
    assert read_manifest(several.output_dir).digest == read_manifest(one.output_dir).digest
    receipt = json.loads((several.output_dir / "receipt.json").read_text())
    assert receipt["train"]["rows_dropped"]["too_long"] + receipt["heldout"]["rows_dropped"]["too_long"] == 400
    assert capfd.readouterr().err == ""


def test_bad_rows_in_the_last_block_are_refused_alike_by_one_process_and_several(
    toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.blocks.BLOCK_BYTES", 2000)
    rows = dataset(tmp_path, 50, 12)
    messages = []
    for count in (1, 2):
        job = render_job(tmp_path / str(count), toy_base, rows, max_lost_share=0.0, num_workers=count)
        with pytest.raises(ConfigError) as caught:
            render(job)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]
    assert "1 of 45 rows lost: 1 too_long" in messages[0]


def peak_bytes(command: list[str], text: str = "") -> tuple[int, int]:
    """Most memory that a program had to itself, and most of any process below it; files and shared memory, which are bounded, left out."""
    own = largest_below = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=child_environment(), text=True) as process:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            own = max(own, anonymous_bytes(process.pid))
            below = [child.pid for child in watched.children(recursive=True)]
            largest_below = max(largest_below, *map(anonymous_bytes, below), 0)
            time.sleep(0.02)
    assert process.returncode == 0
    return own, largest_below


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def program_peak(module: str, job: Job) -> tuple[int, int]:
    config = job.output_dir.with_suffix(".job.json")
    config.write_text(job.model_dump_json())
    return peak_bytes([sys.executable, "-m", module, "--config", str(config)])


def growth(programs: Callable[[Path, Path], dict[str, int]], folder: Path, base: Path, num_rows: tuple[int, int]) -> dict[str, float]:
    """Of each program, how much more memory it takes for the second corpus than for the first, by how much larger that is."""
    found, sizes = [], []
    for count in num_rows:
        place = folder / str(count)
        place.mkdir()
        source = write_corpus(place / "rows.jsonl", count, 100)
        sizes.append(source.stat().st_size)
        found.append(programs(place, base))
    return {name: (found[1][name] - found[0][name]) / (sizes[1] - sizes[0]) for name in found[0]}


def read_render_and_train(folder: Path, base: Path) -> dict[str, int]:
    """The peaks of each program, with one process to render."""
    rows = RowsJob(output_dir=folder / "rows", train=folder / "rows.jsonl", heldout_share=0.02)
    rendered = render_job(folder / "tokens", base, rows.output_dir, max_lost_share=0.05)
    train = TrainConfig(precision="fp32", lora=LoraConfig(rank=4), batch_rows=4, micro_batch_rows=1, max_steps=3, eval_rows=2)
    tuned = FinetuneJob(output_dir=folder / "adapter", base_dir=base, tokens_dir=rendered.output_dir, train=train)
    tuned.output_dir.mkdir()
    return {
        "rows": program_peak("training.data.rows", rows)[0],
        "render": program_peak("training.data.render", rendered)[0],
        "train": peak_bytes([sys.executable, "-c", TRAIN_FEW_STEPS], tuned.model_dump_json())[0],
    }


def render_on_ray(folder: Path, base: Path) -> dict[str, int]:
    """The peaks of the driver and of the largest of all processes that Ray starts."""
    prepare_rows(RowsJob(output_dir=folder / "rows", train=folder / "rows.jsonl", heldout_share=0.02))
    job = render_job(folder / "tokens", base, folder / "rows", num_workers=2, max_lost_share=0.05)
    return dict(zip(("driver", "worker"), program_peak("training.data.render", job), strict=True))


@pytest.mark.slow
def test_memory_hardly_grows_with_the_corpus(toy_base: Path, tmp_path: Path) -> None:
    """Of 2 MB and of 12 MB: what a block takes is there in both. Rows or tokens held in Python would take several times the corpus."""
    found = growth(read_render_and_train, tmp_path, toy_base, (4_000, 20_000))
    assert max(found.values()) < 0.6, found


@pytest.mark.slow
def test_memory_of_driver_and_workers_hardly_grows_with_the_corpus(toy_base: Path, tmp_path: Path) -> None:
    """Of 12 MB and of 60 MB. Ray's processes differ by 20 MB from run to run; one that kept its blocks would take twice the corpus."""
    found = growth(render_on_ray, tmp_path, toy_base, (20_000, 100_000))
    assert max(found.values()) < 0.75, found
