"""How sure a mean is: intervals for a score, for the difference of two models, and for their agreement.

- Scores lie between 0 and 1, and rows are independent draws. A value without its interval decides nothing.
- Every interval keeps a width when all rows are alike: twenty right answers do not prove a model perfect.
- All are closed formulae: no random draws, so the same scores always pass or fail the same gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from infra.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` rows, and its confidence limits."""

    value: float
    low: float
    high: float
    n: int


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The share of successes with Wilson's score interval.

    Raises:
        ConfigError: no rows, more successes than rows, or a confidence outside (0, 1).

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    z = _z(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(f"Found {successes} successes of {n} rows; at least one row, and no more successes than rows, are needed.")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At none and at all the limit is exactly 0 and 1, where floating point would leave 1e-17.
    return Interval(share, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half, n)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean score: with Wilson's interval when every score is 0 or 1, else with the "plus four" interval.

    Plus four: the normal interval after two rows of score 0 and two of score 1 are added. It is wide for few rows
    and for scores that hardly vary, never too narrow.

    Raises:
        ConfigError: no rows, a score outside [0, 1], or a confidence outside (0, 1).

    Source: A. Agresti and B. Coull, Approximate is better than "exact", The American Statistician 52 (1998), 119-126.
    """
    _check(values)
    if all(value in (0, 1) for value in values):
        return wilson_interval(round(sum(values)), len(values), confidence)
    low, high = _adjusted_limits(math.fsum(values) + 2, math.fsum(value * value for value in values) + 2, len(values) + 4, confidence)
    mean = math.fsum(values) / len(values)
    return Interval(mean, max(0.0, min(mean, low)), min(1.0, max(mean, high)), len(values))


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `a - b` over the same rows, positive when `a` scores higher, with Agresti and Min's interval.

    It is the normal interval of the row differences after two rows are added: one without a difference, half a row of
    +1 and half a row of -1. For scores of 0 and 1 this is theirs exactly (half a row in each cell of the 2x2 table).

    Raises:
        ConfigError: no rows, unequal lengths, a score outside [0, 1], or a confidence outside (0, 1).

    Source: A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched proportions,
    Statistics in Medicine 24 (2005), 729-740.
    """
    _check_lengths(a, b)
    _check((*a, *b))
    differences = [first - second for first, second in zip(a, b, strict=True)]
    n = len(differences)
    low, high = _adjusted_limits(math.fsum(differences), math.fsum(change * change for change in differences) + 1, n + 2, confidence)
    mean = math.fsum(differences) / n
    return Interval(mean, max(-1.0, min(mean, low)), min(1.0, max(mean, high)), n)


def agreement(a: Sequence[str], b: Sequence[str], confidence: float = 0.95) -> Interval:
    """The share of rows on which two models give the same text, with Wilson's interval.

    Raises:
        ConfigError: no rows, unequal lengths, or a confidence outside (0, 1).
    """
    _check_lengths(a, b)
    return wilson_interval(sum(first == second for first, second in zip(a, b, strict=True)), len(a), confidence)


def _adjusted_limits(total: float, total_of_squares: float, rows: int, confidence: float) -> tuple[float, float]:
    """Normal limits of a mean from sums that already hold the added rows."""
    mean = total / rows
    half = _z(confidence) * math.sqrt((total_of_squares / rows - mean * mean) / rows)
    return mean - half, mean + half


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"Found a confidence of {confidence}; a number between 0 and 1 is needed, for example 0.95.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _check_lengths(a: Sequence[object], b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise ConfigError(f"Found {len(a)} rows and {len(b)} rows; the same rows of both are needed. Answer all rows with both models.")


def _check(values: Sequence[float]) -> None:
    if not values:
        raise ConfigError("Found no scores; at least one row is needed. Check that the held-out split is not empty.")
    wrong = [value for value in values if not 0 <= value <= 1]
    if wrong:
        raise ConfigError(f"Found a score of {wrong[0]!r}; scores between 0 and 1 are needed. Check the scorer.")
