"""What a run has to say where others read it: a comment in Markdown, for a commit, a merge request or a chat."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, SlipwayError
from infra.files import read_json, write_text_atomic
from pipelines.display import MODEL_ORDER
from pipelines.report import PAGE_NAME, REPORT_NAME

COMMENT_NAME = "comment.md"
# Hosts refuse comments of more than 65,536 characters; no table here is allowed to come near that.
MAX_TABLE_ROWS = 60
MAX_ERROR_CHARS = 4_000
VERDICTS = {2: "bad input", 3: "refused", 75: "try again"}


@contextmanager
def about(title: str, folder: Path | None) -> Iterator[None]:
    """Leaves the comment on what runs inside in `folder`, beside the report if it came as far as one; None leaves nothing.

    What an earlier run left there is taken away first: an old report is never taken for a new one.

    Raises ConfigError when the folder cannot be made.
    """
    if folder is None:
        yield
        return
    _clear(folder)
    try:
        yield
    except SlipwayError as error:
        _write(folder, title, error)
        raise
    _write(folder, title, None)


def render(title: str, report: Mapping[str, Any] | None, error: SlipwayError | None) -> str:
    """The comment: how it ended, the score table, the gates, and the error's text. Names that come from data are no markup in it."""
    parts = [f"### {_text(title)}: {_verdict(report, error)}"]
    if report is not None:
        parts += [_scores(report["scores"]), _gates(report["gates"])]
    if error is not None:
        parts.append(f"<pre>{html.escape(error.message[:MAX_ERROR_CHARS])}</pre>")
    if report is not None:
        minutes = sum(report["timings_s"].values()) / 60
        parts.append(f"run `{report['run_id']}`, {minutes:.1f} min of work; all of it is in {PAGE_NAME}")
    return "\n\n".join(parts) + "\n"


def _clear(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report-dir {folder}: {error}. A folder that can be written is needed.") from error
    for name in (COMMENT_NAME, REPORT_NAME, PAGE_NAME):
        (folder / name).unlink(missing_ok=True)


def _write(folder: Path, title: str, error: SlipwayError | None) -> None:
    report = read_json(folder / REPORT_NAME) if (folder / REPORT_NAME).is_file() else None
    write_text_atomic(folder / COMMENT_NAME, render(title, report, error))


def _verdict(report: Mapping[str, Any] | None, error: SlipwayError | None) -> str:
    if error is not None:
        return f"{VERDICTS.get(error.exit_code, 'failed')} (exit {error.exit_code})"
    version = report["model"]["version"] if report else None
    return f"version {version} is `@champion`" if version else "done"


def _scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """As the terminal shows it: slices that Slipway found in the rows are left to the report."""
    models = sorted(scores, key=lambda name: (*MODEL_ORDER, name).index(name))
    metrics = dict.fromkeys(metric for name in models for metric in scores[name] if "=" not in metric)
    rows = []
    for metric in metrics:
        found = [scores[name].get(metric) for name in models]
        n = next(score["n"] for score in found if score)
        rows.append([metric, f"{n:g}", *(f"{it['value']:.3f} ({it['low']:.3f} to {it['high']:.3f})" if it else "-" for it in found)])
    return _table(["score", "rows", *models], rows)


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    """What refused stands open; what passed is folded away."""
    refused = [[gate["name"], gate["detail"]] for gate in gates if not gate["passed"]]
    passed = [[gate["name"], gate["detail"]] for gate in gates if gate["passed"]]
    parts = [_table(["refused by", "detail"], refused)] if refused else []
    if passed:
        parts.append(f"<details><summary>{len(passed)} of {len(gates)} gates passed</summary>")
        parts += [_table(["gate", "detail"], passed), "</details>"]
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = [header, ["---"] * len(header), *rows[:MAX_TABLE_ROWS]]
    lines = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in shown]
    left = len(rows) - MAX_TABLE_ROWS
    return "\n".join(lines) + (f"\n\nand {left} more in {PAGE_NAME}" if left > 0 else "")


def _text(cell: str) -> str:
    """One line without markup: the name of a metric or of a slice comes from data, and may hold a link, a tag or somebody's @name."""
    line = " ".join(html.escape(cell.replace("|", "/"), quote=False).split())
    return re.sub(r"([\\`*\[\]~])", r"\\\1", line).replace("@", "@\u200b")
