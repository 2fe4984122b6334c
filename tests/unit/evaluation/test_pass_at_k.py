"""pass@k against exact rationals and against enumeration."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference, pass_at_k, pass_at_k_each


@st.composite
def counts(draw, largest=1024):
    n = draw(st.integers(1, largest))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


def exact(n, c, k):
    missed = Fraction(1)
    for i in range(k):  # every one of k draws misses
        missed *= Fraction(max(0, n - c - i), n - i)
    return 1 - missed


@given(counts())
def test_pass_at_k_equals_the_exact_rational(case):
    assert abs(Fraction(pass_at_k(*case)) - exact(*case)) <= Fraction(1, 10**12)


@pytest.mark.parametrize("n", [1023, 1024])
def test_corners_of_large_n(n):
    for c, k in itertools.product((0, 1, 2, n // 2, n - 1, n), (1, 2, n // 2, n - 1, n)):
        value, truth = pass_at_k(n, c, k), exact(n, c, k)
        assert abs(Fraction(value) - truth) <= truth * Fraction(1, 10**15)


@given(counts(largest=7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 1))
def test_pass_at_k_is_unbiased(n, k, p):
    k = min(k, n)
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"<="):
        pass_at_k(n, c, k)


def test_mean_and_standard_error():
    assert mean_and_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    mean, error = mean_and_error([0.25])
    assert mean == 0.25
    assert math.isnan(error)
    with pytest.raises(ValueError, match="held_out"):
        mean_and_error([])


def test_standard_error_is_the_spread_over_resamplings():
    """Standard error is the spread of the mean over resamplings."""
    rng = np.random.default_rng(0)
    draws = rng.beta(0.5, 0.5, (4000, 30))
    errors = np.array([mean_and_error(d)[1] for d in draws])
    assert errors.mean() == pytest.approx(draws.mean(1).std(), rel=0.05)


def test_paired_difference_removes_the_spread_between_problems():
    before, after = [0, 2, 4, 6], [1, 3, 5, 7]
    mean, error = paired_difference(8, before, after, 1)
    assert mean == pytest.approx(1 / 8)
    assert error == pytest.approx(0, abs=1e-15)
    assert paired_difference(8, before, [2 * c for c in after], 1, n_after=16) == pytest.approx((mean, error))
    with pytest.raises(ValueError, match="4 problems before, 3 after"):
        paired_difference(8, before, after[:3], 1)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=20), st.integers(1, 8))
def test_paired_difference_is_the_difference_of_means(pairs, k):
    before, after = zip(*pairs, strict=True)
    mean, error = paired_difference(8, before, after, k)
    expected = pass_at_k_each(8, after, k).mean() - pass_at_k_each(8, before, k).mean()
    assert mean == pytest.approx(expected, abs=1e-12)
    assert error >= 0
