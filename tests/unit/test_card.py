"""The model card: what it says, that nothing in it is markup, and what a registry's description can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.config import parse
from infra.registry import MAX_DESCRIPTION_CHARS
from pipelines import card
from pipelines.spec import Spec

SCORE = {"value": 0.91, "low": 0.85, "high": 0.95, "n": 120}
LINEAGE = {"spec": "a" * 64, "quantized": "b" * 64}


@pytest.fixture
def spec() -> Spec:
    dataset = {"type": "files", "train": "/data/rows.jsonl"}
    return parse(Spec, {"name": "lamp", "base_model": "file:/base", "dataset": dataset, "train": {"lora": {"rank": 7}}}, "spec")


def report_of(num_slices: int = 0, **changes: Any) -> dict[str, Any]:
    slices = {f"exact/slice-{number}": SCORE for number in range(num_slices)}
    compared = {"same_answer": SCORE, "score_change": {"value": -0.01, "low": -0.02, "high": 0.0, "n": 120}}
    split = {"rows_read": 900, "rows_kept": 880, "tokens_kept": 54321, "tokens_supervised": 12345}
    return {
        "run_id": "run-1",
        "model": {"digest": "b" * 64},
        "scores": {"base": {"exact": {**SCORE, "value": 0.1}}, "openvino-int8": {"exact": SCORE, **slices}},
        "gates": [{"name": "exact of openvino-int8", "passed": False, "detail": "0.910, at least 0.950 needed"}],
        "parity": {"reference": "adapter", "models": {"merged": compared}},
        "receipt": {"train": split, "max_tokens": 256},
        "training": {"steps": 55, "final_loss": 0.03125, "precision": "bf16", "seconds": 60.5},
        **changes,
    }


def test_card_tells_scores_gates_receipt_training_lineage_and_how_to_serve(spec: Spec, tmp_path: Path) -> None:
    parts = card.sections(spec, report_of(), LINEAGE, "openvino-int8")
    markdown, page = (path.read_text() for path in card.write("lamp version 3", parts, tmp_path))
    for line in (
        "| exact | 120 | 0.100 (0.850 to 0.950) | 0.910 (0.850 to 0.950) |",
        "| exact of openvino-int8 | refused | 0.910, at least 0.950 needed |",
        "| train | 900 | 880 | 54321 | 12345 |",
        "| merged | 0.910 of 120 | -0.010 (-0.020 to +0.000) |",
        "| LoRA rank | 7 |",
        "| loss | 0.03125 |",
        f"| quantized | {'b' * 64} |",
        "slipway serve lamp@champion",
        "file:/base, fine-tuned with lora on rows.jsonl and kept as openvino-int8 weights. Run run-1 made it; artifact " + "b" * 64,
    ):
        assert line in markdown, line
        for cell in line.strip("| ").split(" | "):
            assert cell in page.replace("&#39;", "'"), cell
    assert markdown.count("\n| ---") + markdown.count("\n|---") == 6, "every table has its header"


def test_card_shows_the_candidates_where_there_was_a_choice(spec: Spec, tmp_path: Path) -> None:
    small = {"format": "openvino-int4", "bytes": 90e6, "tokens_per_s": 801.4, "why": "refused: exact"}
    large = {"format": "openvino-int8", "bytes": 140e6, "tokens_per_s": 850.0, "why": "the cheapest that passes"}

    def written(*candidates: dict[str, Any]) -> str:
        parts = card.sections(spec, report_of(candidates={"candidates": list(candidates)}), LINEAGE, "x")
        return card.write("lamp", parts, tmp_path)[0].read_text()

    assert "| openvino-int4 | 90 | 801 | refused: exact |\n| openvino-int8 | 140 | 850 | the cheapest that passes |\n" in written(
        small, large
    )
    assert "## Candidates" not in written(large)


def test_names_from_data_are_no_markup_and_break_no_table(spec: Spec, tmp_path: Path) -> None:
    gate = {"name": "on slice <script>|a\nb", "passed": True, "detail": "1 < 2"}
    paths = card.write("lamp", card.sections(spec, report_of(gates=[gate]), LINEAGE, "x"), tmp_path)
    markdown, page = (path.read_text() for path in paths)
    assert "| on slice &lt;script&gt;/a b | pass | 1 &lt; 2 |\n" in markdown
    assert "<script>" not in page


def test_description_that_is_too_long_keeps_whole_sections_and_says_where_the_rest_is(spec: Spec) -> None:
    short = card.description("lamp", card.sections(spec, report_of(), LINEAGE, "x"), "run-1")
    assert "Shortened" not in short
    assert "## Made from" in short
    long = card.description("lamp", card.sections(spec, report_of(num_slices=200), LINEAGE, "x"), "run-1")
    assert len(long) <= MAX_DESCRIPTION_CHARS
    assert long.endswith("Shortened: all of it is model-card.md of run run-1.\n")
    assert "## Gates" in long
    assert "## Made from" not in long
