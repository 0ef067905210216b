"""Two models on the same rows: the difference with its interval, whether it is one at all, and whether it stays within a margin.

- `loss` is how much worse the model is than its reference, whichever way the metric counts: above 0 is worse.
- The interval that decides is Agresti and Min's for means of scores between 0 and 1, else the paired bootstrap. The bootstrap's is told
  beside it in any case, but has no width where two models are right on the same rows, and so cannot decide that they are alike.
- A model is non-inferior when the whole interval of its loss lies within the margin, inferior when none of it does, else undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

from infra.evaluation.hypotheses import holm, is_binary, mcnemar_exact, rows_for_margin, rows_to_differ
from infra.evaluation.metrics import Metric
from infra.evaluation.resampling import paired_bootstrap, randomization_p
from infra.evaluation.statistics import Interval, paired_difference

TOLERANCE = 1e-9
"""Of comparisons with a threshold, for 0.98 - 0.96 is above 0.02 in floating point."""

Verdict = Literal["non-inferior", "undecided", "inferior"]


@dataclass(frozen=True)
class Comparison:
    """What the same rows say of a model against its reference, by one metric."""

    model: str
    reference: str
    metric: str
    loss: Interval
    """How much worse the model is; the interval decides."""
    bootstrap: Interval
    """The same loss with the paired bootstrap's limits."""
    test: Literal["mcnemar", "randomization"]
    p: float
    """Two-sided p-value of no difference."""
    variance: float
    """Of the rows' differences, as the interval has it."""
    rows_to_differ: int | None
    """Rows with which a difference of this size would be told from none four times of five; None where there is none."""


def compare(metric: Metric, model: str, reference: str, observed: Sequence[Any], expected: Sequence[Any], confidence: float) -> Comparison:
    """`observed` of the model and `expected` of its reference, row by row. Raises ConfigError where the rows are not the same."""
    worse, better = (expected, observed) if metric.is_better_higher else (observed, expected)
    bootstrap = paired_bootstrap(worse, better, metric.pool, confidence)
    loss = _deciding(metric, worse, better, bootstrap, confidence)
    exact = metric.is_mean_score and is_binary((*observed, *expected))
    p = mcnemar_exact(observed, expected) if exact else randomization_p(observed, expected, metric.pool)
    variance = _variance(loss, confidence)
    rows = rows_to_differ(variance, loss.value, confidence)
    return Comparison(model, reference, metric.name, loss, bootstrap, "mcnemar" if exact else "randomization", p, variance, rows)


def verdict(loss: Interval, margin: float) -> Verdict:
    """What the interval of a loss says of a margin."""
    if loss.high <= margin + TOLERANCE:
        return "non-inferior"
    return "inferior" if loss.low > margin + TOLERANCE else "undecided"


def told_together(found: Sequence[Comparison], margins: Mapping[str, float], confidence: float) -> list[dict[str, Any]]:
    """Comparisons of one model with one reference as plain values, p-values adjusted for the number of metrics.

    `margins` by metric: those without one have no verdict.
    """
    adjusted = holm({each.metric: each.p for each in found})
    return [_told(each, adjusted[each.metric], margins.get(each.metric), confidence) for each in found]


def _told(found: Comparison, p_adjusted: float, margin: float | None, confidence: float) -> dict[str, Any]:
    direction = "worse" if found.loss.value > 0 else "better"
    told = {
        **{name: getattr(found, name) for name in ("model", "reference", "metric", "test", "p", "rows_to_differ")},
        "loss": asdict(found.loss),
        "bootstrap": {"low": found.bootstrap.low, "high": found.bootstrap.high},
        "p_adjusted": p_adjusted,
        "finding": direction if p_adjusted <= 1 - confidence else "no difference shown",
    }
    if margin is None:
        return told
    rows = rows_for_margin(found.variance, max(0.0, found.loss.value), margin, confidence)
    return {**told, "margin": margin, "verdict": verdict(found.loss, margin), "rows_for_margin": rows}


def _deciding(metric: Metric, worse: Sequence[Any], better: Sequence[Any], bootstrap: Interval, confidence: float) -> Interval:
    if metric.is_mean_score:
        return paired_difference(worse, better, confidence)
    if metric.is_bounded and bootstrap.low == bootstrap.high:
        return paired_difference([0.0] * bootstrap.n, [0.0] * bootstrap.n, confidence)  # no row differs, which few rows do not prove
    return bootstrap


def _variance(loss: Interval, confidence: float) -> float:
    """Of the rows' differences, from the width that it gave the interval."""
    return ((loss.high - loss.low) / 2 / NormalDist().inv_cdf(0.5 + confidence / 2)) ** 2 * loss.n
