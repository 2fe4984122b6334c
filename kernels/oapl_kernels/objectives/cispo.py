"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)."""

import torch
from torch import Tensor

from .objective import Objective, PolicyInputs, clip_range


def cispo(clip_low: float = 1.0, clip_high: float = 4.0) -> Objective:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * ln pi.

    Every token keeps a gradient; only its weight is clipped. Normaliser: trained tokens of the optimizer step.
    """
    low, high = clip_range(clip_low, clip_high)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        weight = torch.exp((logprob - inputs.behavior_logprob).detach()).clamp(low, high)
        return inputs.token_loss(-weight * inputs.per_token(inputs.advantage) * logprob, mean_per_sequence=False)

    return Objective("cispo", "token", fn, normalizer="tokens")
