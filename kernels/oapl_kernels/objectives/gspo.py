"""GSPO (arXiv 2507.18071, eq. 5 and 7)."""

import torch
from torch import Tensor

from .grpo import clipped_surrogate
from .objective import Objective, PolicyInputs, clip_range


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO (arXiv 2507.18071, eq. 5 and 7): PPO clip on the length-normalised sequence ratio
    s_i = exp(mean_t [ln pi - ln pi_behavior]). Normaliser: N sequences."""
    clip_range(clip_low, clip_high)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        ratio = torch.exp(inputs.per_sequence(logprob - inputs.behavior_logprob) / inputs.lengths())
        return -clipped_surrogate(ratio, inputs.advantage, clip_low, clip_high).sum()

    return Objective("gspo", "sequence", fn)
