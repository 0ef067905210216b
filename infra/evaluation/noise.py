"""The noise floor: how much a model's figure moves when the same model answers the same prompts again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from infra.answers import Answer
from infra.errors import ConfigError
from infra.evaluation.metrics import Metric, Row


def noise_floor(metrics: Sequence[Metric], first: Sequence[Row], second: Sequence[Row], num_rows: int, confidence: float) -> dict[str, Any]:
    """Rows asked twice, how many gave another answer, and by metric what a difference over `num_rows` rows owes to that alone.

    For a mean of scores it is z * sqrt(mean squared difference of a row / num_rows), the half-width of an interval round 0; for any other
    figure the difference of the two times. Where the model answers as before it is 0: it is deterministic as far as was looked.

    Raises:
        ConfigError: the rows are not the same, or there are none.

    Source: of measuring repeatability by asking twice, J. Bland and D. Altman, Measurement error, BMJ 313 (1996), 744.
    """
    if len(first) != len(second) or not first:
        raise ConfigError(f"Found {len(first)} and {len(second)} rows; the same rows, answered twice, are needed. Answer them again.")
    differing = sum(_said(one.answer) != _said(other.answer) for one, other in zip(first, second, strict=True))
    floors = {metric.name: _floor(metric, first, second, num_rows, confidence) for metric in metrics}
    return {"rows": len(first), "differing": differing, "floor": {name: floor for name, floor in floors.items() if floor is not None}}


def told(noise: Mapping[str, Any]) -> str:
    """One line for people."""
    if not noise["differing"]:
        return f"deterministic: {noise['rows']} rows answered twice, all alike"
    return f"{noise['differing']} of {noise['rows']} rows answered otherwise the second time"


def _floor(metric: Metric, first: Sequence[Row], second: Sequence[Row], num_rows: int, confidence: float) -> float | None:
    pairs = [(metric.observe(one), metric.observe(other)) for one, other in zip(first, second, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs or not metric.is_bounded:  # seconds differ each time, and likelihoods are not asked twice
        return None
    if not metric.is_mean_score:
        return abs(metric.pool([one for one, _ in pairs]) - metric.pool([other for _, other in pairs]))
    squares = math.fsum((one - other) ** 2 for one, other in pairs) / len(pairs)
    return NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(squares / num_rows)


def _said(answer: Answer) -> tuple[str, str]:
    return answer.text, answer.finish_reason
