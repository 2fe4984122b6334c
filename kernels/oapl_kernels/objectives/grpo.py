"""GRPO (arXiv 2402.03300, eq. 3) and the clipped surrogate of PPO (arXiv 1707.06347, eq. 7)."""

import torch
from torch import Tensor

from .objective import Objective, PolicyInputs, clip_range


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's min(ratio * A, clip(ratio) * A) (arXiv 1707.06347, eq. 7), elementwise."""
    low, high = clip_range(clip_low, clip_high)
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def grpo(
    clip_low: float = 0.2, clip_high: float = 0.2, mean_per_sequence: bool = True, corrected: bool = True
) -> Objective:
    """GRPO (arXiv 2402.03300, eq. 3) with the clipped ratio pi / pi_behavior, token by token.

    The behaviour log-probs in the ratio make it "GRPO + importance sampling", the baseline of the OAPL paper.
    mean_per_sequence divides each sequence by its trained tokens, as published. Normaliser: N sequences.
    corrected = False takes the samples for the current policy's own (ratio 1, gradient A * grad ln pi): what a trainer
    does that recomputes the old log-probs and steps once. It breaks under lag; it is here to be compared with.
    """
    clip_range(clip_low, clip_high)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        ratio = torch.exp(logprob - (inputs.behavior_logprob if corrected else logprob.detach()))
        gain = clipped_surrogate(ratio, inputs.per_token(inputs.advantage), clip_low, clip_high)
        return inputs.token_loss(-gain, mean_per_sequence)

    return Objective("grpo", "token", fn)
