"""A vocabulary that may be sharded over the ranks of a process group, each with some rows of the weight."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(process_group: Any) -> str | None:
    """What a custom op knows of a process group."""
    return None if process_group is None else process_group.group_name


class Vocabulary:
    """Size and offset of this rank's rows; without a process group, the whole vocabulary."""

    def __init__(self, weight: Tensor, group: str | None):
        self.group, self.size, self.offset = None, len(weight), 0
        if group is None:
            return
        self.group = dist.distributed_c10d._resolve_process_group(group)
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=weight.device)
        rank = dist.get_rank(self.group)
        sizes[rank] = len(weight)
        dist.all_reduce(sizes, group=self.group)
        self.size, self.offset = int(sizes.sum()), int(sizes[:rank].sum())
        self.local = len(weight)

    def local_target(self, target: Tensor) -> Tensor:
        """target [T] as rows of this rank's weight; -1 on another rank."""
        target = target.long()
        if self.group is None:
            return target
        local = target - self.offset
        return torch.where((local >= 0) & (local < self.local), local, -1)

    def combine(self, statistics: Tensor, target: Tensor) -> Tensor:
        """[4, t] of this rank's rows -> of the whole vocabulary, the same bits on every rank."""
        if self.group is None:
            return statistics
        logprob, entropy, maximum, log_sum = statistics
        mean = log_sum - entropy  # of x - maximum under this rank's softmax
        mine = torch.stack([maximum, log_sum, mean, logprob, (target >= 0).to(logprob.dtype)])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        maxima, log_sums, means, logprobs, owners = torch.stack(parts, 1)
        top = maxima.amax(0)
        shift = maxima - top
        total = torch.logsumexp(shift + log_sums, 0)
        chosen = ((logprobs + log_sums + shift - total) * owners).sum(0)
        average = (torch.exp(shift + log_sums - total) * (means + shift)).sum(0)
        return torch.stack([chosen, total - average, top, total])

    def reduce(self, hidden_gradient: Tensor) -> None:
        """Sum a gradient with respect to the replicated hidden states over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(hidden_gradient, group=self.group)
