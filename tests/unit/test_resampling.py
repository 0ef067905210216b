from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from infra.errors import ConfigError
from infra.evaluation.resampling import bootstrap_interval, mean, paired_bootstrap, randomization_p


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(one for one, _ in pairs) / sum(other for _, other in pairs)


def scores(seed: int, n: int = 120) -> list[float]:
    rng = random.Random(seed)
    return [rng.betavariate(4, 1) for _ in range(n)]


def test_bootstrap_interval_of_a_mean_agrees_with_scipy() -> None:
    values = scores(1)
    found = bootstrap_interval(values, mean)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    # A limit of 2000 draws is sure to about a twentieth of the interval's width.
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.05 * (reference.high - reference.low))
    assert found.value == pytest.approx(np.mean(values))
    assert found.n == 120


def test_bootstrap_interval_of_a_ratio_agrees_with_scipy() -> None:
    tops, bottoms = scores(2), [value + 1 for value in scores(3)]
    found = bootstrap_interval(list(zip(tops, bottoms, strict=True)), ratio)

    def statistic(top: np.ndarray, bottom: np.ndarray) -> float:
        return float(np.sum(top) / np.sum(bottom))

    drawn = stats.bootstrap(
        (tops, bottoms), statistic, paired=True, vectorized=False, method="percentile", n_resamples=5000, rng=np.random.default_rng(4)
    )
    low, high = drawn.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.07 * (high - low))


def test_bootstrap_interval_same_rows_give_the_same_limits_and_less_confidence_is_narrower() -> None:
    values = scores(5)
    wide, narrow = bootstrap_interval(values, mean), bootstrap_interval(values, mean, confidence=0.8)
    assert bootstrap_interval(values, mean) == wide
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_paired_bootstrap_of_means_equals_that_of_any_figure_and_is_narrower_than_unpaired() -> None:
    a = scores(6)
    b = [value * 0.9 for value in a]

    def other_mean(values: Sequence[float]) -> float:
        return mean(values)  # another function, so the general way is taken

    fast, general = paired_bootstrap(a, b, mean), paired_bootstrap(a, b, other_mean)
    assert (fast.value, fast.low, fast.high) == pytest.approx((general.value, general.low, general.high))
    assert fast.value == pytest.approx(0.1 * mean(a))
    alone = bootstrap_interval(a, mean)
    assert fast.high - fast.low < 0.2 * (alone.high - alone.low)


def test_randomization_p_of_few_rows_agrees_with_the_exact_test() -> None:
    a, b = [0.9, 0.8, 0.95, 0.7, 0.85, 0.9, 0.6], [0.7, 0.85, 0.6, 0.4, 0.8, 0.7, 0.5]
    exact = stats.permutation_test(
        ([x - y for x, y in zip(a, b, strict=True)],), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert exact < 0.1
    # Four standard errors of a share near 0.03 in 2000 draws.
    assert randomization_p(a, b, mean) == pytest.approx(exact, abs=0.016)


def test_randomization_p_alike_is_one_and_all_better_is_as_small_as_draws_allow() -> None:
    a = scores(7)
    assert randomization_p(a, a, mean) == 1.0
    assert randomization_p([value + 1 for value in a], a, mean) == 1 / 2001


def test_resampling_no_rows_and_unequal_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        bootstrap_interval([], mean)
    with pytest.raises(ConfigError, match="confidence of 95"):
        bootstrap_interval([1.0], mean, confidence=95)
    for call in (lambda: paired_bootstrap([1.0, 0.0], [1.0], mean), lambda: randomization_p([1.0, 0.0], [1.0], mean)):
        with pytest.raises(ConfigError, match="2 rows and 1 rows"):
            call()
