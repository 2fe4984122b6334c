"""What a step trains on: rollouts selected by rule, their advantages, and what the metrics say about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from oapl_kernels import Objective, group_value, grpo_advantage
from oapl_kernels.objectives import soft_overlong_penalty

from oapl_engine.config import ObjectiveConfig
from oapl_engine.distributed import Ranks
from oapl_engine.samples import Group, Rollout, decode_groups, encode_groups
from oapl_engine.trainer.objective import make_objective
from oapl_engine.trainer.packing import TrainGroup

Recorded = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class StepSelection:
    """What an optimizer step trains on.

    groups:   one per trained group
    dropped:  rollout key to the rule that left it out, for the ledger
    beta2:    as given, or the step's scale-free one
    metrics:  those that follow from the data alone; None where nothing was there to measure
    """

    groups: tuple[TrainGroup, ...]
    dropped: dict[str, str]
    beta2: float
    metrics: dict[str, float | None]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(r.key for group in self.groups for r in group.rollouts)

    @property
    def tokens(self) -> int:
        return sum(int(np.count_nonzero(r.loss_mask)) for group in self.groups for r in group.rollouts)


@dataclass(frozen=True)
class _Candidate:
    """A group that may be trained.

    rollouts:  the usable ones
    reward:    [n] f64, as trained
    basis:     [m] f64, rewards that the group's value is estimated from
    """

    rollouts: tuple[Rollout, ...]
    reward: NDArray[np.float64]
    basis: NDArray[np.float64]

    @property
    def equal(self) -> bool:
        return bool(self.basis.min() == self.basis.max())


def exchange_groups(ranks: Ranks, own: Sequence[Group], order: Sequence[str]) -> list[Group]:
    """All ranks' groups on every rank (token ids: small), in the order of ids `order`, so that all find the same
    advantages, drops and normaliser. Collective. Raises KeyError where no rank has one."""
    payloads = ranks.gather_bytes(encode_groups(own))
    found = {group.id: group for payload in payloads for group in decode_groups(payload)}
    return [found[key] for key in order]


def select_rollouts(
    groups: Sequence[Group], section: ObjectiveConfig, max_new_tokens: int, recorded_rewards: Recorded | None = None
) -> StepSelection:
    """The groups of an optimizer step with their advantages.

    recorded_rewards: group id to all rewards that were recorded for the prompt, where more than the rollouts at hand

    Rollouts that are not scored are left out silently: their status is their column of the ledger. Non-finite rewards
    are passed on as non-finite advantages: `train_step` refuses them, by the recipe's rule.
    """
    objective = make_objective(section, section.beta2)
    dropped: dict[str, str] = {}
    candidates = [_candidate(g, section, max_new_tokens, (recorded_rewards or {}).get(g.id), dropped) for g in groups]
    usable = [c for c in candidates if c is not None]
    kept = _without_equal(usable, section.equal_groups, dropped)
    values = [_advantage(c, objective, section.beta1) for c in kept]
    trained = tuple(TrainGroup(c.rollouts, a.astype(np.float32)) for c, a in zip(kept, values, strict=True))
    known_values = [_value(c, objective, section.beta1) for c in kept if np.isfinite(c.basis).all()]
    beta2 = section.beta2
    # root mean square of all advantages
    spread = float(torch.from_numpy(np.concatenate(values)).square().mean().sqrt()) if values else 0.0
    if section.scale_free_nats is not None and np.isfinite(spread) and spread > 0:
        beta2 = spread / section.scale_free_nats
    return StepSelection(trained, dropped, beta2, _metrics(groups, usable, values, known_values))


def _candidate(
    group: Group,
    section: ObjectiveConfig,
    max_new_tokens: int,
    recorded: NDArray[np.float64] | None,
    dropped: dict[str, str],
) -> _Candidate | None:
    rollouts = group.scored()
    if section.overlong == "excluded":
        dropped.update({r.key: "overlong" for r in rollouts if r.finish == "length"})
    dropped.update({r.key: "no_tokens" for r in rollouts if not r.loss_mask.any()})
    rollouts = tuple(r for r in rollouts if r.key not in dropped)
    reward = np.array([r.reward for r in rollouts], np.float64)
    if section.overlong == "soft":  # over the last fifth
        lengths = torch.tensor([r.response_tokens for r in rollouts], dtype=torch.float64)
        reward = reward + soft_overlong_penalty(lengths, max_new_tokens, max(1, max_new_tokens // 5)).numpy()
    basis = reward if recorded is None else recorded
    if not rollouts or len(basis) < 2:
        dropped.update({r.key: "group_too_small" for r in rollouts})
        return None
    return _Candidate(rollouts, reward, basis)


def _without_equal(usable: list[_Candidate], rule: str, dropped: dict[str, str]) -> list[_Candidate]:
    """subsample: as many groups of equal rewards, the first ones, as there are others."""
    if rule == "keep":
        return usable
    allowed = sum(not c.equal for c in usable) if rule == "subsample" else 0
    kept = []
    for candidate in usable:
        if candidate.equal and allowed <= 0:
            dropped.update({r.key: "equal_rewards" for r in candidate.rollouts})
            continue
        allowed -= candidate.equal
        kept.append(candidate)
    return kept


def _advantage(candidate: _Candidate, objective: Objective, beta1: float) -> NDArray[np.float64]:
    if not (np.isfinite(candidate.basis).all() and np.isfinite(candidate.reward).all()):
        return np.full(len(candidate.reward), np.nan)
    if objective.baseline == "zscore" and candidate.basis is candidate.reward:
        reward = torch.from_numpy(candidate.reward)
        return grpo_advantage(reward, torch.tensor([0, len(reward)])).numpy()
    return candidate.reward - _value(candidate, objective, beta1)


def _value(candidate: _Candidate, objective: Objective, beta1: float) -> float:
    """OAPL's value of the group at temperature beta1, or for other baselines the group's mean, at infinity."""
    basis = torch.from_numpy(candidate.basis)
    temperature = beta1 if objective.baseline == "value" else float("inf")
    return float(group_value(basis, torch.tensor([0, len(basis)]), temperature))


def _metrics(
    groups: Sequence[Group],
    usable: list[_Candidate],
    advantages: list[NDArray[np.float64]],
    values: list[float],
) -> dict[str, float | None]:
    scored = [r for group in groups for r in group.scored()]
    return {
        "reward/all/mean": _mean([float(r.reward) for r in scored if r.reward is not None]),
        "seq_len/mean": _mean([r.response_tokens for r in scored]),
        "is_truncated/mean": _mean([r.finish == "length" for r in scored]),
        "filters/zero_variance": _mean([c.equal for c in usable]),
        "advantage/mean": _mean(np.concatenate(advantages) if advantages else []),
        "value/mean": _mean(values),
    }


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Mean, None where there is none or it is not finite (JSON has no NaN)."""
    mean = float(np.mean(values)) if len(values) else np.nan
    return mean if np.isfinite(mean) else None
