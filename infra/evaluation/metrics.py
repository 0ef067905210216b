"""Metrics: what is observed of each answer, and how the rows' observations become one figure with an interval.

- A metric that is a mean of scores between 0 and 1 has the closed intervals of `statistics`, which keep a width when all rows are alike.
- Any other figure (macro-F1 and BLEU are no means, seconds and perplexity have no upper end) has a bootstrap interval.
- A row that does not carry what a metric needs, such as a time nobody took, is left out; a metric without rows has no figure at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from infra.answers import Answer, ExpectedLogprob
from infra.errors import ConfigError
from infra.evaluation import labels, overlap
from infra.evaluation.own_scorer import is_own
from infra.evaluation.resampling import bootstrap_interval, mean
from infra.evaluation.scorers import SCORERS, Scorer, find_scorer
from infra.evaluation.statistics import Interval, mean_interval, wilson_interval


@dataclass(frozen=True)
class Row:
    """All that is known of one answer."""

    expected: str
    answer: Answer
    logprob: ExpectedLogprob | None = None


@dataclass(frozen=True)
class Metric:
    """One way of measuring a model."""

    name: str
    observe: Callable[[Row], Any]
    """What one row adds; None where the row does not carry it."""
    pool: Callable[[Sequence[Any]], float] = mean
    """The figure of many observations."""
    is_bounded: bool = True
    """Whether the figure lies between 0 and 1."""
    is_better_higher: bool = True

    @property
    def is_mean_score(self) -> bool:
        """Whether it is a mean of scores between 0 and 1."""
        return self.is_bounded and self.pool is mean


def perplexity(rows: Sequence[ExpectedLogprob]) -> float:
    """Perplexity of the expected answers: exp of the mean negative log-probability of a token, over all tokens of these rows.

    Source: F. Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, JASA Supplement 62 (1977), S63.
    """
    return math.exp(-math.fsum(row.logprob_sum for row in rows) / sum(row.num_tokens for row in rows))


NEEDED_PACKAGES = {"rouge_l": "rouge_score", "bleu": "sacrebleu"}

POOLED: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("macro_f1", lambda row: labels.label_pair(row.answer.text, row.expected), labels.macro_f1),
        Metric("bleu", lambda row: overlap.bleu_counts(row.answer.text, row.expected), overlap.bleu),
        Metric("stop_rate", lambda row: float(row.answer.finish_reason == "stop")),
        Metric("latency_s", lambda row: row.answer.latency_s, is_bounded=False, is_better_higher=False),
        Metric("perplexity", lambda row: row.logprob, perplexity, is_bounded=False, is_better_higher=False),
    )
}


def metric_names() -> list[str]:
    """Every metric that has a name of its own."""
    return sorted({*SCORERS, *POOLED})


def find_metric(name: str) -> Metric:
    """The metric of that name or dotted path. Raises ConfigError where there is none or its package is missing."""
    package = NEEDED_PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"metric {name!r} needs the package {package}. Install it with `pip install 'slipway-ml[evaluate]'`.")
    if name in POOLED:
        return POOLED[name]
    if not is_own(name) and name not in SCORERS:
        known = ", ".join(metric_names())
        raise ConfigError(f"metric {name!r} is unknown; known are {known}, or a function of your own as package.module:function.")
    return Metric(name, partial(_scored, cache(find_scorer(name))))  # a row is looked at once for itself and once a comparison


def measure(metric: Metric, observations: Sequence[Any], confidence: float) -> Interval:
    """The figure of these rows with its interval. Raises ConfigError without rows."""
    if metric.is_mean_score:
        return mean_interval(observations, confidence)
    found = bootstrap_interval(observations, metric.pool, confidence)
    if metric.is_bounded and found.value in (0, 1):
        # All rows alike, and so is every resample of them; the interval of a share keeps the doubt that few rows leave.
        return wilson_interval(round(found.value) * found.n, found.n, confidence)
    return found


def _scored(scorer: Scorer, row: Row) -> float:
    return scorer(row.answer.text, row.expected)
