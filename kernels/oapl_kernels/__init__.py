"""Per-token log-probs and policy losses of a vocabulary head, without ever holding [tokens, vocabulary] logits."""

from .group import group_advantage, group_value, grpo_advantage
from .linear_logprob import linear_logprob
from .objectives.objective import Objective, PolicyInputs
from .policy_loss import PolicyLoss, fused_policy_loss, oapl_loss
from .sequence import sequence_sum

__all__ = [
    "Objective",
    "PolicyInputs",
    "PolicyLoss",
    "fused_policy_loss",
    "group_advantage",
    "group_value",
    "grpo_advantage",
    "linear_logprob",
    "oapl_loss",
    "sequence_sum",
]
