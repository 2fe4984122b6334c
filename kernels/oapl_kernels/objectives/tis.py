"""Truncated importance sampling (Yao et al. 2025; truncation: Ionides 2008)."""

import torch
from torch import Tensor

from .grpo import clipped_surrogate
from .objective import Objective, PolicyInputs, clip_range, positive


def tis(
    cap: float = 2.0,
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    mean_per_sequence: bool = True,
) -> Objective:
    """GRPO with truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"; truncation: Ionides 2008).

    level "token": -min(pi_old / pi_behavior, cap) * PPO-clip(pi / pi_old), where pi_old is
    inputs.proximal_logprob, or the current policy where that is None.
    level "sequence": -min(prod_t pi / pi_behavior, cap) * A * sum_t ln pi, the weight without gradient.
    """
    positive("cap", cap)
    clip_range(clip_low, clip_high)

    def token_fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        old = logprob.detach() if inputs.proximal_logprob is None else inputs.proximal_logprob
        weight = torch.exp(old - inputs.behavior_logprob).clamp_max(cap)
        advantage = inputs.per_token(inputs.advantage)
        gain = weight * clipped_surrogate(torch.exp(logprob - old), advantage, clip_low, clip_high)
        return inputs.token_loss(-gain, mean_per_sequence)

    def sequence_fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        log_ratio = inputs.per_sequence((logprob - inputs.behavior_logprob).detach())
        weight = torch.exp(log_ratio).clamp_max(cap) * inputs.advantage
        sums = inputs.per_sequence(logprob)
        return -(weight * (sums / inputs.lengths() if mean_per_sequence else sums)).sum()

    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; allowed: 'token', 'sequence'")
    return Objective(f"tis_{level}", level, token_fn if level == "token" else sequence_fn)
