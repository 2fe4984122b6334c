"""Tapered off-policy REINFORCE (arXiv 2503.14286, eq. 7)."""

import torch
from torch import Tensor

from .objective import Objective, PolicyInputs


def topr() -> Objective:
    """Tapered off-policy REINFORCE (arXiv 2503.14286, eq. 7): positive sequences as they are, negative ones with
    their sequence ratio pi / pi_behavior truncated to [0, 1]; weights without gradient. Normaliser: N sequences."""

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        log_ratio = inputs.per_sequence((logprob - inputs.behavior_logprob).detach())
        weight = torch.where(inputs.advantage >= 0, 1.0, torch.exp(log_ratio.clamp_max(0)))
        return -(weight * inputs.advantage * inputs.per_sequence(logprob)).sum()

    return Objective("topr", "sequence", fn, baseline="mean")
