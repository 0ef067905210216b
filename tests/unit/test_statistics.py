from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from infra.errors import ConfigError
from infra.evaluation.statistics import Interval, agreement, mean_interval, paired_difference, wilson_interval


def coverage(true_value: float, draw: Callable[[random.Random], Interval], draws: int = 2000) -> float:
    """The share of simulated samples whose interval holds the true value; 2000 draws give a standard error of 0.005."""
    rng = random.Random(7)
    intervals = [draw(rng) for _ in range(draws)]
    return sum(interval.low <= true_value <= interval.high for interval in intervals) / draws


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998),
        # table I, method 3 (score without continuity correction), 95 %.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_published_cases_agree(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    # The table has four decimals.
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5.1e-5)
    assert (interval.value, interval.n) == (successes / n, n)


def test_wilson_interval_all_right_ends_at_one_and_mirrors_all_wrong() -> None:
    # Exactly: the bare formula leaves 1e-17 at many of these lengths.
    assert {(wilson_interval(0, n).low, wilson_interval(n, n).high) for n in range(1, 400)} == {(0.0, 1.0)}
    right, wrong = wilson_interval(29, 29), wilson_interval(0, 29)
    assert (right.high, wrong.low) == (1.0, 0.0)
    assert right.low == pytest.approx(1 - wrong.high, abs=1e-12)


def test_wilson_interval_more_confidence_is_wider() -> None:
    # z = 2.5758 at 99 %, worked by hand: centre (0.5 + z²/20) / (1 + z²/10) = 0.5, half-width z / (1 + z²/10) * sqrt(0.025 + z²/400).
    z = 2.5758293
    half = z / (1 + z * z / 10) * (0.025 + z * z / 400) ** 0.5
    interval = wilson_interval(5, 10, confidence=0.99)
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ConfigError, match=f"{successes} successes of {n} rows"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_intervals_confidence_out_of_range_is_refused(confidence: float) -> None:
    for compute in (mean_interval, lambda values, c: paired_difference(values, values, c)):
        with pytest.raises(ConfigError, match=f"confidence of {confidence}"):
            compute([0.5, 1.0], confidence)


def test_mean_interval_scores_of_zero_and_one_is_wilson() -> None:
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)


def test_mean_interval_partial_scores_holds_the_mean_and_stays_in_range() -> None:
    for values in ([0.5], [1.0, 0.99], [0.0, 0.01, 0.0], [0.2, 0.9, 0.4]):
        interval = mean_interval(values)
        assert 0 <= interval.low < interval.value < interval.high <= 1
        assert interval.value == pytest.approx(sum(values) / len(values))
        assert interval.n == len(values)


def test_mean_interval_equal_partial_scores_narrow_with_rows() -> None:
    few, many = mean_interval([0.5] * 5), mean_interval([0.5] * 500)
    assert few.high - few.low > 0.3
    # Four added rows of variance 0.25 among 504: 2 * 1.96 * sqrt(1/504 / 504) = 0.0078.
    assert many.high - many.low == pytest.approx(0.0078, abs=1e-4)


@pytest.mark.parametrize("n", [5, 15, 100])
def test_mean_interval_skewed_partial_scores_covers_as_promised(n: int) -> None:
    def draw(rng: random.Random) -> Interval:
        return mean_interval([rng.betavariate(4, 0.5) for _ in range(n)])

    # A percentile bootstrap covers 0.75 at n = 5 here (measured once). Conservative is accepted, too narrow is not.
    assert coverage(4 / 4.5, draw) >= 0.94


@pytest.mark.parametrize(("n", "gain", "loss"), [(10, 0.2, 0.1), (30, 0.05, 0.0), (300, 0.03, 0.02)])
def test_paired_difference_binary_scores_covers_as_promised(n: int, gain: float, loss: float) -> None:
    def draw(rng: random.Random) -> Interval:
        moves = rng.choices([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [gain, loss, 1 - gain - loss], k=n)
        return paired_difference([a for a, _ in moves], [b for _, b in moves])

    assert coverage(gain - loss, draw) >= 0.93


def test_paired_difference_counts_of_a_table_gives_agresti_and_min() -> None:
    # 12 rows better, 4 worse, 84 alike. With half a row a cell: gain 12.5/102, loss 4.5/102, difference 0.078431,
    # standard error sqrt((17/102 - 0.078431²)/102) = 0.039670; 1.959964 of them are 0.077751.
    a = [1.0] * 12 + [0.0] * 4 + [1.0] * 60 + [0.0] * 24
    b = [0.0] * 12 + [1.0] * 4 + [1.0] * 60 + [0.0] * 24
    interval = paired_difference(a, b)
    assert interval.value == pytest.approx(0.08, abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx((0.078431 - 0.077751, 0.078431 + 0.077751), abs=2e-6)


def test_paired_difference_equal_rows_is_zero_with_a_width_that_shrinks() -> None:
    few, many = paired_difference([1.0] * 3, [1.0] * 3), paired_difference([1.0] * 300, [1.0] * 300)
    assert few.value == many.value == 0.0
    assert few.low == pytest.approx(-few.high)
    assert few.high > 0.3
    assert many.high == pytest.approx(1.96 * (1 / 302 / 302) ** 0.5, abs=1e-4)


def test_paired_difference_swapped_models_mirrors() -> None:
    a, b = [1.0, 1.0, 0.0, 0.7], [0.0, 1.0, 0.0, 0.9]
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward.value == pytest.approx((1 - 0.2) / 4)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))


def test_paired_difference_pairing_is_narrower_than_two_separate_intervals() -> None:
    rng = random.Random(3)
    b = [float(rng.random() < 0.5) for _ in range(200)]
    a = [1.0 - score if row % 40 == 0 else score for row, score in enumerate(b)]
    paired = paired_difference(a, b)
    separate = mean_interval(a)
    assert paired.high - paired.low < 0.6 * (separate.high - separate.low)


@pytest.mark.parametrize(("a", "b"), [([1.0], [0.0]), ([0.0], [1.0]), ([1.0, 1.0], [0.0, 0.0]), ([0.9], [0.1])])
def test_paired_difference_one_or_two_rows_holds_its_value_in_range(a: Sequence[float], b: Sequence[float]) -> None:
    interval = paired_difference(a, b)
    assert -1 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < 0 < interval.high  # one or two rows prove nothing


def test_agreement_counts_equal_texts_exactly() -> None:
    assert agreement(["a", "b ", "c"], ["a", "b", "c"]) == wilson_interval(2, 3)


@pytest.mark.parametrize("compute", [paired_difference, agreement])
def test_paired_intervals_unequal_or_no_rows_are_refused(compute: Callable[..., Interval]) -> None:
    with pytest.raises(ConfigError, match="2 rows and 1 rows"):
        compute([1, 0], [1])
    with pytest.raises(ConfigError, match="at least one row"):
        compute([], [])


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [0.5, 1.5], [-0.1]])
def test_mean_interval_no_or_impossible_scores_are_refused(values: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"(is|are) needed"):
        mean_interval(values)
