"""What a person sees of a run, on stderr; stdout is left to results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

PLAIN_INTERVAL_S = 15.0
MODEL_ORDER = ("base", "adapter", "merged")  # then the served format
LOG_WIDTH = 140  # of a log file, which has no width of its own


class Display:
    """Progress of the running step, and plain lines where there is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        if not self.console.is_terminal:
            self.console = Console(stderr=True, quiet=quiet, highlight=False, width=LOG_WIDTH)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._printed_s = 0.0

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text)

    def skipped(self, name: str, artifact: str) -> None:
        """A step whose output is there already."""
        self.console.print(f"  [dim]skip  {name:<24} already made: {artifact}[/dim]")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Shows a bar while the step runs and a line with its seconds when it is done."""
        started_s = time.monotonic()
        self._name, self._printed_s = name, started_s
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            self._progress, self._task = progress, progress.add_task(name, total=None, figures="")
            try:
                yield
            finally:
                self._progress, self._task = None, None
        self.console.print(f"  [green]done[/green]  {name:<24} {time.monotonic() - started_s:6.1f} s")

    def tick(self, progress_file: Path) -> None:
        """Shows the newest line of a program's progress file."""
        line = _last_line(progress_file)
        if line is None or self._progress is None or self._task is None:
            return
        figures = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in line.items()
            if key not in ("time_s", "done", "total", "unit")
        )
        self._progress.update(self._task, completed=line["done"], total=line["total"], figures=figures)
        now_s = time.monotonic()
        if not self.console.is_terminal and now_s - self._printed_s >= PLAIN_INTERVAL_S:
            self._printed_s = now_s
            self.console.print(f"        {self._name:<24} {line['done']:g}/{line['total']:g} {line['unit']}  {figures}")


def _last_line(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 2000))
            lines = stream.read().splitlines()
        return dict(json.loads(lines[-1])) if lines else None
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or its last line is being written
        return None


def plan_table(planned: Sequence[Any]) -> Table:
    """The plan as a table: step, what happens, why."""
    table = Table("step", "plan", "why", box=None, pad_edge=False)
    for item in planned:
        table.add_row(item.step.label, "run" if item.will_run else "skip", item.reason)
    return table


def score_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Scores by metric and model, each with its interval; slices that Slipway found in the rows are left to the report."""
    scores = dict(sorted(scores.items(), key=lambda item: (*MODEL_ORDER, item[0]).index(item[0])))
    metrics = dict.fromkeys(
        (metric, found["n"]) for by_metric in scores.values() for metric, found in by_metric.items() if "=" not in metric
    )
    # A name that does not fit goes on in the next line: cut off, several candidates or slices would look alike.
    columns = [Column(name, overflow="fold") for name in ("score", "rows", *scores)]
    table = Table(*columns, box=None, pad_edge=False)
    for metric, n in metrics:
        found = [by_metric.get(metric) for by_metric in scores.values()]
        table.add_row(metric, f"{n:g}", *(f"{it['value']:.3f} ({it['low']:.3f}-{it['high']:.3f})" if it else "-" for it in found))
    return table


def gate_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    """Gates with what was measured and what was needed."""
    table = Table("gate", "", "detail", box=None, pad_edge=False)
    for gate in gates:
        table.add_row(gate["name"], "[green]pass[/green]" if gate["passed"] else "[red]refused[/red]", gate["detail"])
    return table


def candidate_table(choice: Mapping[str, Any]) -> Table:
    """Candidates for serving: score with interval, change against what was trained, size, speed, and why it was chosen or not."""
    table = Table("candidate", "score", "change", "MB", "tokens/s", "ms/token", "", "why", box=None, pad_edge=False)
    for each in choice["candidates"]:
        verdict = "[green]chosen[/green]" if each["chosen"] else "pass" if each["passed"] else "[red]refused[/red]"
        table.add_row(
            each["format"],
            "{value:.3f} ({low:.3f}-{high:.3f})".format(**each["score"]),
            "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**each["change"]),
            f"{each['bytes'] / 1e6:.1f}",
            f"{each['tokens_per_s']:.0f}",
            f"{each['ms_per_token']:.1f}",
            verdict,
            each["why"],
        )
    return table


def estimate_table(estimate: Mapping[str, Any]) -> Table:
    """Memory by use, and time."""
    table = Table("one worker", "", box=None, pad_edge=False)
    for name, size in estimate["memory_bytes"].items():
        table.add_row(name, f"{size / 1e9:.2f} GB")
    table.add_row("measured peak", f"{estimate['measured_peak_bytes'] / 1e9:.2f} GB in {estimate['measured_steps']} steps")
    table.add_row("time", f"{estimate['steps']} steps of {estimate['step_s']:.2f} s: {estimate['total_s'] / 60:.1f} min")
    return table
