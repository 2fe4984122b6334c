"""Bias of the group's value estimate: E[V̂] − V* for binary rewards, exactly, by `python -m experiments.value_bias`.

V̂ = β1·ln mean_group exp(r/β1) of G samples is below V* = β1·ln E[exp(r/β1)] by Jensen's inequality, of order 1/G. The
expectation is a sum over how many of G samples are right (binomial), with the engine's own V̂.
"""

from __future__ import annotations

import math
import sys

import torch
from oapl_kernels import group_advantage

SIZES = (2, 4, 8, 16, 32, 64)
SHARES = (0.1, 0.25, 0.5, 0.75)


def bias(share: float, size: int, beta1: float = 1.0) -> float:
    """E[V̂] − V* with a chance of `share` that a sample is right, G = size, float64."""
    rewards = torch.tril(torch.ones(size + 1, size, dtype=torch.float64), -1)  # row c: c right answers
    offsets = torch.arange(0, (size + 1) * size + 1, size)
    advantage = group_advantage(rewards.flatten(), offsets, beta1).view(size + 1, size)
    value = (rewards - advantage)[:, 0]
    chance = [math.comb(size, c) * share**c * (1 - share) ** (size - c) for c in range(size + 1)]
    optimum = beta1 * math.log1p(share * math.expm1(1 / beta1))
    return float(torch.tensor(chance, dtype=torch.float64) @ value) - optimum


def table(beta1: float = 1.0) -> list[str]:
    """Markdown: a row a share of right answers, a column a group size."""
    lines = [f"| E[V̂] − V*, β1 = {beta1:g} | " + " | ".join(f"G={size}" for size in SIZES) + " |"]
    lines.append("|---" * (len(SIZES) + 1) + "|")
    for share in SHARES:
        lines.append(f"| p = {share:g} | " + " | ".join(f"{bias(share, size, beta1):+.4f}" for size in SIZES) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
    sys.exit(0)
