"""Log-probs of finished rollouts under a policy: the same packing, attention and head as in training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from oapl_engine.samples import Batch, Group, Rollout
from oapl_engine.trainer.packing import TrainGroup
from oapl_engine.trainer.policy import Policy

LogProbs = dict[str, NDArray[np.float32]]


def score(
    policy: Policy, groups: Sequence[Group], *, temperature: float, token_budget: int, share_prompts: bool = True
) -> LogProbs:
    """Rollout key to log-probs [response tokens] f32 of every rollout with a sampled token; 0 where loss_mask is 0."""
    kept = [tuple(r for r in g.rollouts if r.loss_mask.any()) for g in groups]
    unweighted = [TrainGroup(rollouts, np.zeros(len(rollouts), np.float32)) for rollouts in kept if rollouts]
    by_key = {r.key: r for rollouts in kept for r in rollouts}
    scored: LogProbs = {}
    for batch in policy.batches(unweighted, token_budget, share_prompts):
        values = np.split(_logprob(policy, batch, temperature), batch.cu_seqlens[1:-1])
        for key, value in zip(batch.keys, values, strict=True):
            mask = by_key[key].loss_mask[by_key[key].prompt_length :] != 0
            scored[key] = np.zeros(len(mask), np.float32)
            scored[key][mask] = value
    return scored


@torch.no_grad()
def _logprob(policy: Policy, batch: Batch, temperature: float) -> NDArray[np.float32]:
    return policy.logprob(batch, temperature).cpu().numpy()


def fill_logprobs(field: str, policy: Policy, batches: Sequence[Batch], temperature: float) -> list[Batch]:
    """The batches with field `proximal_logprob` (by the policy before the step) or `reference_logprob` filled in."""
    filled = []
    for batch in batches:
        values = np.zeros(len(batch.target), np.float32)
        values[batch.rows] = _logprob(policy, batch, temperature)
        filled.append(replace(batch, **{field: values}))  # type: ignore[arg-type]
    return filled


def replace_behavior_logprob(groups: Sequence[Group], logprobs: Mapping[str, NDArray[np.float32]]) -> list[Group]:
    """The groups with behaviour log-probs replaced by recomputed ones, [response] by rollout key, where there are."""

    def recomputed(rollout: Rollout) -> Rollout:
        if rollout.key not in logprobs:
            return rollout
        prompt = np.zeros(rollout.prompt_length, np.float32)
        return replace(rollout, behavior_logprob=np.concatenate([prompt, logprobs[rollout.key]]))

    return [replace(group, rollouts=tuple(map(recomputed, group.rollouts))) for group in groups]
