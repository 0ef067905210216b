"""Held-out prompts and the answers to them: the files by which both stacks are compared row by row.

A tokens artifact holds `prompts.jsonl`, made once by the trainer's own encoding; every model, in either stack, answers those very ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.errors import ArtifactError

PROMPTS_NAME = "prompts.jsonl"
ANSWERS_NAME = "answers.jsonl"
EXPECTED_NAME = "expected.jsonl"


class Prompt(Config):
    """One held-out row, ready to be answered."""

    row: int
    """Index in heldout.jsonl."""
    ids: tuple[int, ...]
    """Token ids up to and including the generation prompt."""
    expected: str
    """Text of the row's own last answer."""
    expected_ids: tuple[int, ...] = ()
    """Token ids of that answer, its stop token included."""
    slice: str = ""
    """Named part of the held-out rows that is also scored by itself; empty for none."""
    language: str = ""
    """Language of the row where it says so; each is scored by itself too."""


class Answer(Config):
    """One greedy answer."""

    row: int
    ids: tuple[int, ...]
    """Token ids made, without the stop token."""
    text: str
    finish_reason: Literal["stop", "length"]
    latency_s: float | None = Field(None, ge=0)
    """Seconds from asking to the last token, of a request that had the engine to itself; absent where nobody took the time."""


class ExpectedLogprob(Config):
    """How likely one row's own last answer is under one model, each token given the true ones before it."""

    row: int
    logprob_sum: float = Field(le=0)
    """Sum of the natural logarithms over the tokens of the answer, its stop token included."""
    num_tokens: int = Field(ge=1)


def write_prompts(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Writes `prompts.jsonl`."""
    _write(folder / PROMPTS_NAME, prompts)


def read_prompts(folder: Path, limit_rows: int | None = None) -> list[Prompt]:
    """The prompts of a tokens artifact, the first `limit_rows` of them where given."""
    return [Prompt.model_validate_json(line) for line in read_lines(folder / PROMPTS_NAME)[:limit_rows]]


def write_answers(folder: Path, answers: Iterable[Answer]) -> None:
    """Writes `answers.jsonl`, in the order of the prompts."""
    _write(folder / ANSWERS_NAME, answers)


def read_answers(folder: Path) -> list[Answer]:
    """The answers of one model."""
    return [Answer.model_validate_json(line) for line in read_lines(folder / ANSWERS_NAME)]


def write_expected(folder: Path, expected: Iterable[ExpectedLogprob]) -> None:
    """Writes `expected.jsonl`, in the order of the prompts."""
    _write(folder / EXPECTED_NAME, expected)


def read_expected(folder: Path) -> list[ExpectedLogprob]:
    """How likely the expected answers are under one model."""
    return [ExpectedLogprob.model_validate_json(line) for line in read_lines(folder / EXPECTED_NAME)]


def _write(path: Path, items: Iterable[Config]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        # Without what is absent: answers that nobody timed are the same bytes on every machine, and so is their digest.
        stream.writelines(item.model_dump_json(exclude_none=True) + "\n" for item in items)


def read_lines(path: Path) -> list[str]:
    """The lines of a file that one of our programs wrote. Raises ArtifactError where it is absent."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file. Run the step that writes it again.")
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON leaves inside a text.
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
