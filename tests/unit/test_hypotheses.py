from __future__ import annotations

import random

import pytest
from scipy import stats

from infra.errors import ConfigError
from infra.evaluation.hypotheses import holm, mcnemar_exact, rows_for_margin, rows_to_differ
from infra.evaluation.statistics import paired_difference


def rows(better: int, worse: int, alike: int = 50) -> tuple[list[float], list[float]]:
    return [1.0] * better + [0.0] * worse + [1.0] * alike, [0.0] * better + [1.0] * worse + [1.0] * alike


@pytest.mark.parametrize(("better", "worse"), [(9, 1), (1, 9), (0, 5), (12, 4), (86, 150), (7, 7), (0, 0)])
def test_mcnemar_exact_agrees_with_the_binomial_test(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar_exact(*rows(better, worse)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_exact_worked_by_hand() -> None:
    # One of ten in favour: 2 * (1 + 10) / 1024.
    assert mcnemar_exact(*rows(1, 9)) == pytest.approx(22 / 1024)


def test_mcnemar_exact_partial_or_unpaired_scores_are_refused() -> None:
    for a, b in (([0.5], [1.0]), ([1.0, 0.0], [1.0])):
        with pytest.raises(ConfigError, match="McNemar"):
            mcnemar_exact(a, b)


def test_holm_published_example_agrees() -> None:
    # The example of Wikipedia's article on the method, alpha 0.05: only p4 and p1 are rejected.
    adjusted = holm({"p1": 0.01, "p2": 0.04, "p3": 0.03, "p4": 0.005})
    assert adjusted == pytest.approx({"p1": 0.03, "p2": 0.06, "p3": 0.06, "p4": 0.02})
    assert list(adjusted) == ["p1", "p2", "p3", "p4"]


def test_holm_one_p_value_stays_and_none_passes_one() -> None:
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({"a": 0.9, "b": 0.8, "c": 0.7}) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert holm({}) == {}


def test_rows_for_margin_worked_by_hand() -> None:
    # ((1.95996 + 0.84162) / 0.5)^2 = 31.4 of variance 1.
    assert rows_for_margin(1.0, 0.0, 0.5) == 32
    assert rows_for_margin(1.0, 0.25, 0.75) == 32  # the distance to the margin counts
    assert rows_for_margin(1.0, 0.02, 0.02) is None


def test_rows_for_margin_gives_the_promised_power() -> None:
    share = 0.04  # of the rows differ, as often for the better as for the worse
    n = rows_for_margin(share, 0.0, 0.03)
    assert n is not None
    assert power(n, share / 2, share / 2, lambda low, high: high < 0.03) == pytest.approx(0.8, abs=0.05)


def test_rows_to_differ_agrees_with_connor_and_gives_the_promised_power() -> None:
    # Shares 0.2 and 0.1: (1.95996 * sqrt(0.3) + 0.84162 * sqrt(0.29))^2 / 0.1^2 = 233.1.
    n = rows_to_differ(0.3 - 0.1**2, 0.1)
    assert n == 234
    assert power(n, 0.2, 0.1, lambda low, high: low > 0) == pytest.approx(0.8, abs=0.05)
    assert rows_to_differ(0.3, 0.0) is None


def power(n: int, better: float, worse: float, is_shown) -> float:  # type: ignore[no-untyped-def]
    """Share of 800 simulated samples whose interval shows it; its standard error is 0.014."""
    rng = random.Random(11)
    shown = 0
    for _ in range(800):
        moves = rng.choices((1, -1, 0), (better, worse, 1 - better - worse), k=n)
        interval = paired_difference([float(move == 1) for move in moves], [float(move == -1) for move in moves])
        shown += is_shown(interval.low, interval.high)
    return shown / 800
