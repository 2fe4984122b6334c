"""Decoupled PPO (arXiv 2110.00641; AReaL, arXiv 2505.24298, eq. 5)."""

import torch
from torch import Tensor

from .grpo import clipped_surrogate
from .objective import Objective, PolicyInputs, clip_range, require


def decoupled_ppo(clip_low: float = 0.2, clip_high: float = 0.2, mean_per_sequence: bool = False) -> Objective:
    """Decoupled PPO (arXiv 2110.00641; AReaL, arXiv 2505.24298, eq. 5):
    -(pi_prox / pi_behavior) * min(u * A, clip(u) * A), u = pi / pi_prox. Needs inputs.proximal_logprob."""
    clip_range(clip_low, clip_high)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        proximal = require("proximal_logprob", inputs.proximal_logprob, "decoupled_ppo")
        weight = torch.exp(proximal - inputs.behavior_logprob)
        advantage = inputs.per_token(inputs.advantage)
        gain = weight * clipped_surrogate(torch.exp(logprob - proximal), advantage, clip_low, clip_high)
        return inputs.token_loss(-gain, mean_per_sequence)

    return Objective("decoupled_ppo", "token", fn, needs=("proximal_logprob",))
