"""DAPO (arXiv 2503.14476, eq. 8 and 13)."""

from dataclasses import replace

from torch import Tensor

from .grpo import grpo
from .objective import Objective


def dapo(clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """DAPO (arXiv 2503.14476, eq. 8): clip-higher and the mean over all tokens of the step.

    Normaliser: trained tokens of the complete optimizer step. Advantages: `grpo_advantage`.
    """
    return replace(grpo(clip_low, clip_high, mean_per_sequence=False), name="dapo", normalizer="tokens")


def soft_overlong_penalty(response_tokens: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """DAPO's soft overlong punishment (eq. 13) [N], to be added to the reward: 0, falling to -1 over the buffer."""
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}; allowed: 1 to max_tokens ({max_tokens})")
    return ((max_tokens - buffer_tokens - response_tokens) / buffer_tokens).clamp(-1, 0)
