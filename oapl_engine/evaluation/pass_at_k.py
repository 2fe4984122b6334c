"""Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374): 1 − C(n−c, k) / C(n, k), its mean over problems and errors."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples, drawn without replacement from n of which c are correct, is correct.

    Correctly rounded for every n: Python divides whole numbers of any size exactly. Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c = {c} correct samples of n = {n}: must be 0 <= c <= n")
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: pass@k needs 1 <= k <= n = {n}; draw more samples or lower k")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def pass_at_k_each(n: int, correct: Sequence[int], k: int) -> NDArray[np.float64]:
    """pass@k [P] of P problems with n samples each."""
    return np.array([pass_at_k(n, c, k) for c in correct], np.float64)


def mean_and_error(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Mean over problems and its standard error (sample deviation / sqrt P); the error of one problem alone is nan."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no problem: a mean needs one or more; raise data.held_out")
    deviation = values.std(ddof=1) if len(values) > 1 else math.nan
    return float(values.mean()), float(deviation / math.sqrt(len(values)))


def paired_difference(
    n: int, before: Sequence[int], after: Sequence[int], k: int, n_after: int | None = None
) -> tuple[float, float]:
    """Mean of (pass@k after − before) over the same problems in the same order, and its standard error.

    before, after: correct samples of each problem out of n (after: out of n_after, default n).
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} problems before, {len(after)} after: pair the same problems in the same order")
    return mean_and_error(pass_at_k_each(n_after or n, after, k) - pass_at_k_each(n, before, k))
