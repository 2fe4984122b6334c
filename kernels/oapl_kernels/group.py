"""Group value and advantage: G numbers per prompt, plain torch."""

import torch
from torch import Tensor

from .checks import check_group


def group_value(reward: Tensor, cu_groups: Tensor, beta1: float) -> Tensor:
    """V(x) [P] = beta1 * ln mean_i exp(r_i / beta1) of each group (OAPL, arXiv 2602.19362); beta1=inf: the mean.

    reward [N]; cu_groups [P+1] offsets into it. fp32, or fp64 for fp64 rewards.
    """
    check_group(reward, cu_groups, beta1)
    reward = reward if reward.dtype == torch.float64 else reward.float()
    sizes = cu_groups.diff().long()
    group = torch.arange(len(sizes), device=reward.device).repeat_interleave(sizes, output_size=len(reward))
    zeros = reward.new_zeros(len(sizes))
    if beta1 == float("inf"):
        return zeros.index_add_(0, group, reward) / sizes
    top = torch.full_like(zeros, -torch.inf).scatter_reduce_(0, group, reward, "amax")
    # Relative to the best reward, and with expm1 and log1p: exact for tiny and for huge beta1.
    terms = torch.expm1((reward - top[group]) / beta1)
    return top + beta1 * torch.log1p(zeros.index_add_(0, group, terms) / sizes)


def group_advantage(reward: Tensor, cu_groups: Tensor, beta1: float) -> Tensor:
    """A [N] = r - V(x). Arguments as in `group_value`."""
    value = group_value(reward, cu_groups, beta1)
    return reward.to(value.dtype) - value.repeat_interleave(cu_groups.diff().long(), output_size=len(reward))


def grpo_advantage(reward: Tensor, cu_groups: Tensor, epsilon: float = 1e-6) -> Tensor:
    """A [N] = (r - mean) / (std + epsilon) in each group (arXiv 2402.03300, section 4.1.2)."""
    centred = group_advantage(reward, cu_groups, float("inf"))
    variance = group_value(centred.square(), cu_groups, float("inf"))
    return centred / (variance.sqrt() + epsilon).repeat_interleave(cu_groups.diff().long(), output_size=len(reward))
