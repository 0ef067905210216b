"""Is one model worse than another, or only unlucky: exact tests, several of them at once, and how many rows it takes to know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from infra.errors import ConfigError

POWER = 0.8
"""Chance with which `rows_for_margin` and `rows_to_differ` reach a verdict; the usual choice."""


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p-value of "both are right equally often", for scores of 0 and 1 on the same rows.

    Only rows on which the two differ count: under the hypothesis each is as likely to favour one as the other, a binomial with share 1/2.

    Raises:
        ConfigError: unequal lengths, or a score that is neither 0 nor 1.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12 (1947), 153-157;
    exact form: M. Fay, Two-sided exact tests and matching confidence intervals for discrete data, The R Journal 2 (2010), 53-58.
    """
    if len(a) != len(b) or not is_binary((*a, *b)):
        raise ConfigError(f"Found {len(a)} and {len(b)} scores; the same rows of both, scored 0 or 1, are needed for McNemar's test.")
    better = sum(one > other for one, other in zip(a, b, strict=True))
    worse = sum(one < other for one, other in zip(a, b, strict=True))
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def is_binary(values: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(value in (0, 1) for value in values)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each p-value adjusted for all of them: those below a level may be called significant together with that error at most.

    The smallest is multiplied by their number, the next by one less, and so on, never falling below the one before.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979), 65-70.
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    ordered = sorted(p_values, key=lambda name: (p_values[name], name))
    for place, name in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def rows_for_margin(variance: float, loss: float, margin: float, confidence: float = 0.95, power: float = POWER) -> int | None:
    """Rows with which a true `loss` would be shown to lie below `margin`, `power` of the time; None where it does not lie below.

    `variance` is that of the rows' differences. n = ((z_confidence + z_power) / (margin - loss))^2 * variance, with the z of a two-sided
    interval, whose upper limit must stay below the margin.

    Source: S. Julious, Sample sizes for clinical trials with normal data, Statistics in Medicine 23 (2004), 1921-1986, section 4
    (non-inferiority), for paired differences.
    """
    if loss >= margin:
        return None
    factor = _z(confidence) + NormalDist().inv_cdf(power)
    return max(1, math.ceil(variance * (factor / (margin - loss)) ** 2))


def rows_to_differ(variance: float, difference: float, confidence: float = 0.95, power: float = POWER) -> int | None:
    """Rows with which a true `difference` would be told from none, `power` of the time; None where there is none.

    `variance` is that of the rows' differences. n = ((z_confidence * sqrt(variance + difference^2) + z_power * sqrt(variance)) /
    difference)^2: without a difference the rows would scatter by their squares alone.

    Source: R. Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43 (1987), 207-211.
    """
    if difference == 0:
        return None
    spread = _z(confidence) * math.sqrt(variance + difference**2) + NormalDist().inv_cdf(power) * math.sqrt(variance)
    return max(1, math.ceil((spread / difference) ** 2))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
