"""Figures of lm-evaluation-harness: what a general task says of the base and of what was made of it, and what was forgotten between them.

The harness tells a mean with its standard error, not the rows, so two models are compared as if on different rows. That is cautious: the
rows are the same, and a difference on the same rows is surer than it looks here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pydantic import Field

from infra.config import Config
from infra.evaluation.hypotheses import holm
from infra.files import read_json

TASKS_NAME = "tasks.json"
PREFIX = "lm_eval."


class TasksConfig(Config):
    """Which tasks of lm-evaluation-harness the models do."""

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks or groups by the harness's own names."""
    limit_rows: int | None = Field(200, ge=1)
    """Only the first so many rows of each task; absent means all."""
    on_served: bool = Field(True, json_schema_extra={"identity": False})
    """Whether each candidate for serving does them too, in the engine that would serve it: one more pass over the rows for each."""
    folder: Path | None = Field(None, json_schema_extra={"identity": False, "travels": "files"})
    """Folder with task files of your own; a relative path starts at the spec file's folder."""


class TaskFigure(Config):
    """One figure of one task."""

    value: float
    stderr: float | None = None
    """Absent where the harness gives none."""
    n: int
    is_better_higher: bool = True


def task_key(task: str, metric: str, kind: str = "none") -> str:
    """The name of a figure among scores: `lm_eval.arc_easy.acc`, with the harness's filter behind it where it has one."""
    return f"{PREFIX}{task}.{metric}" + ("" if kind == "none" else f".{kind}")


def read_figures(folder: Path) -> dict[str, TaskFigure]:
    """The figures of one model by their names. Raises ArtifactError where the file is absent."""
    return {name: TaskFigure.model_validate(found) for name, found in read_json(folder / TASKS_NAME).items()}


def task_scores(found: Mapping[str, TaskFigure], confidence: float) -> dict[str, dict[str, float]]:
    """As in scores.json; without a standard error the interval has no width."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return {
        name: {"value": it.value, "low": it.value - z * (it.stderr or 0), "high": it.value + z * (it.stderr or 0), "n": it.n}
        for name, it in found.items()
    }


def task_comparisons(
    model: str, found: Mapping[str, TaskFigure], reference: str, expected: Mapping[str, TaskFigure], confidence: float
) -> list[dict[str, Any]]:
    """As in comparisons.json, by a normal test of two independent means; a figure without standard errors is left out."""
    told: list[dict[str, Any]] = []
    p_values: dict[str, float] = {}
    normal = NormalDist()
    for name in (name for name in found if name in expected):
        one, other = found[name], expected[name]
        if one.stderr is None or other.stderr is None:
            continue
        loss = other.value - one.value if one.is_better_higher else one.value - other.value
        error = math.hypot(one.stderr, other.stderr)
        p_values[name] = 2 * normal.cdf(-abs(loss) / error) if error else float(loss == 0)
        half = normal.inv_cdf(0.5 + confidence / 2) * error
        told.append({"metric": name, "loss": {"value": loss, "low": loss - half, "high": loss + half, "n": min(one.n, other.n)}})
    adjusted = holm(p_values)
    facts = {"model": model, "reference": reference, "test": "normal", "rows_to_differ": None}
    return [{**each, **facts, "p": p_values[each["metric"]], **_finding(each, adjusted, confidence)} for each in told]


def _finding(told: Mapping[str, Any], adjusted: Mapping[str, float], confidence: float) -> dict[str, Any]:
    p = adjusted[told["metric"]]
    direction = "worse" if told["loss"]["value"] > 0 else "better"
    limits = {"low": told["loss"]["low"], "high": told["loss"]["high"]}
    return {"p_adjusted": p, "finding": direction if p <= 1 - confidence else "no difference shown", "bootstrap": limits}
