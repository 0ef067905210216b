"""The comment on a run: what it says, that nothing of the data is markup in it, and what a host can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError, GateFailed, TransientError
from infra.files import write_json_atomic
from pipelines import comment

SCORE = {"value": 0.91, "low": 0.85, "high": 0.95, "n": 120}
MAX_HOST_CHARS = 65_536


def report_of(**changes: Any) -> dict[str, Any]:
    gates = [
        {"name": "exact of int8", "passed": False, "detail": "0.910, at least 0.950 needed"},
        {"name": "drop", "passed": True, "detail": "0.001"},
    ]
    scores = {"openvino-int8": {"exact": SCORE, "exact/tool=on": SCORE}, "base": {"exact": {**SCORE, "value": 0.1}}}
    return {"run_id": "r1", "model": {"version": "3"}, "timings_s": {"train": 90.0}, "scores": scores, "gates": gates, **changes}


def test_comment_shows_scores_in_the_models_order_and_what_refused() -> None:
    said = comment.render("lamp", report_of(), GateFailed("one gate refused it"))
    assert "### lamp: refused (exit 3)" in said
    assert "| score | rows | base | openvino-int8 |" in said
    assert "| exact | 120 | 0.100 (0.850 to 0.950) | 0.910 (0.850 to 0.950) |" in said
    assert "tool=on" not in said
    assert said.index("| exact of int8 | 0.910, at least 0.950 needed |") < said.index("1 of 2 gates passed") < said.index("| drop |")
    assert "1.5 min of work" in said


def test_comment_on_names_from_data_holds_no_markup() -> None:
    name = "a|b [x](http://e) @bob <img>\n# top"
    said = comment.render(name, report_of(scores={"m": {name: SCORE}}), ConfigError("</pre><script>"))
    assert "<img" not in said
    assert "<script>" not in said
    assert "@bob" not in said
    assert "](" not in said.replace("\\](", "")
    (row,) = [line for line in said.splitlines() if "img" in line and line.startswith("|")]
    assert row.count("|") == 4
    assert not [line for line in said.splitlines() if line.startswith("# ")]


def test_comment_of_many_slices_fits_a_host_and_says_how_many_are_left() -> None:
    said = comment.render("lamp", report_of(scores={f"m{n}": {f"exact/{i}": SCORE for i in range(200)} for n in range(8)}), None)
    assert len(said) < MAX_HOST_CHARS
    assert "and 140 more in report.html" in said


def test_about_writes_how_it_ended_beside_the_new_report_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with comment.about("lamp", folder):
        write_json_atomic(folder / "report.json", report_of())
    assert "version 3 is `@champion`" in (folder / "comment.md").read_text()
    with pytest.raises(TransientError), comment.about("lamp", folder):
        raise TransientError("the store is away")
    assert sorted(path.name for path in folder.iterdir()) == ["comment.md"]
    assert (folder / "comment.md").read_text() == "### lamp: try again (exit 75)\n\n<pre>the store is away</pre>\n"


def test_about_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--report-dir"), comment.about("lamp", tmp_path / "file"):
        pass
