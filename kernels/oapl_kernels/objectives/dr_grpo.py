"""Dr. GRPO (arXiv 2503.20783, section 3.2)."""

from dataclasses import replace

from .grpo import grpo
from .objective import Objective


def dr_grpo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """Dr. GRPO (arXiv 2503.20783, section 3.2): GRPO without 1/|o_i|; the sum over tokens is divided by a constant.

    Normaliser: N * L with one constant length L for the complete run. Advantages: r - mean(r), without the
    division by the group's standard deviation (`group_advantage(..., beta1=inf)`).
    """
    objective = grpo(clip_low, clip_high, mean_per_sequence=False)
    return replace(objective, name="dr_grpo", baseline="mean", normalizer="constant")
