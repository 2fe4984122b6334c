"""Group value and advantage: G numbers a prompt, plain torch."""

import torch
from torch import Tensor

from .checks import check_group


def group_value(reward: Tensor, cu_groups: Tensor, beta1: float, valid: Tensor | None = None) -> Tensor:
    """V(x) [P] = beta1 * ln mean_i exp(r_i / beta1) of each group (OAPL, arXiv 2602.19362); beta1=inf: the mean.

    reward [N]; cu_groups [P+1] offsets into it; valid [N] nonzero where a rollout is scored (None: all).
    A group without a scored rollout has the value 0. fp32, or fp64 for fp64 rewards.
    """
    check_group(reward, cu_groups, beta1, valid)
    reward = reward if reward.dtype == torch.float64 else reward.float()
    sizes = cu_groups.diff().long()
    group = torch.arange(len(sizes), device=reward.device).repeat_interleave(sizes, output_size=len(reward))
    scored = torch.ones_like(reward) if valid is None else (valid != 0).to(reward.dtype)
    reward = torch.where(scored > 0, reward, 0)
    count = torch.zeros(len(sizes), dtype=reward.dtype, device=reward.device).index_add_(0, group, scored)
    if beta1 == float("inf"):
        return torch.zeros_like(count).index_add_(0, group, reward * scored) / count.clamp_min(1)
    top = torch.full_like(count, -torch.inf).scatter_reduce_(
        0, group, torch.where(scored > 0, reward, -torch.inf), "amax"
    )
    top = torch.where(count > 0, top, 0)
    # Relative to the best reward, and with expm1 and log1p: exact for tiny and for huge beta1.
    terms = torch.expm1((reward - top[group]) / beta1) * scored
    return top + beta1 * torch.log1p(torch.zeros_like(count).index_add_(0, group, terms) / count.clamp_min(1))


def group_advantage(reward: Tensor, cu_groups: Tensor, beta1: float, valid: Tensor | None = None) -> Tensor:
    """A [N] = r - V(x) for scored rollouts, 0 for the others. Arguments as in `group_value`."""
    value = group_value(reward, cu_groups, beta1, valid)
    advantage = reward.to(value.dtype) - value.repeat_interleave(cu_groups.diff().long(), output_size=len(reward))
    return advantage if valid is None else torch.where(valid != 0, advantage, 0)


def grpo_advantage(reward: Tensor, cu_groups: Tensor, valid: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """A [N] = (r - mean) / (std + epsilon) over each group's scored rollouts (arXiv 2402.03300, section 4.1.2)."""
    centred = group_advantage(reward, cu_groups, float("inf"), valid)
    variance = group_value(centred.square(), cu_groups, float("inf"), valid)
    return centred / (variance.sqrt() + epsilon).repeat_interleave(cu_groups.diff().long(), output_size=len(reward))
