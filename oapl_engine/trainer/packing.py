"""Packed micro-batches: variable length, no padding, and each group's prompt once.

Rows of a group with a shared prompt of P tokens: the prefix, prompt[:P-1], then for each response prompt[P-1:] and the
response up to the token before its last scored one. So every row that predicts a response token belongs to that
response alone, and no row needs special treatment. Without sharing, a response's rows begin with its complete prompt.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oapl_engine.distributed import Ranks
from oapl_engine.samples import Batch, PromptSpan, Rollout

IGNORE = -100


@dataclass(frozen=True)
class TrainGroup:
    """The rollouts of one group that are trained, and their advantages [n] f32."""

    rollouts: tuple[Rollout, ...]
    advantage: NDArray[np.float32]


def pack(groups: Iterable[TrainGroup], token_budget: int, share_prompts: bool) -> list[Batch]:
    """Micro-batches of at most `token_budget` rows with nearly equal loads; the same input gives the same batches.

    A group stays together where it fits and is split between responses where not; a single response longer than the
    budget goes alone. Raises ValueError for a rollout without scored token or prompt, and for a group of two prompts.
    """
    parts = [part for group in groups for part in _split(group, token_budget, share_prompts)]
    bins = _balance([_row_count(part, share_prompts) for part in parts], token_budget)
    return [_batch([parts[i] for i in chosen], share_prompts) for chosen in bins]


def _split(group: TrainGroup, token_budget: int, share_prompts: bool) -> list[TrainGroup]:
    _check(group, share_prompts)
    cuts = [0]
    for i in range(1, len(group.rollouts)):
        together = TrainGroup(group.rollouts[cuts[-1] : i + 1], group.advantage)
        if not share_prompts or _row_count(together, True) > token_budget:
            cuts.append(i)
    ends = [*cuts[1:], len(group.rollouts)]
    return [TrainGroup(group.rollouts[a:b], group.advantage[a:b]) for a, b in zip(cuts, ends, strict=True)]


def _check(group: TrainGroup, share_prompts: bool) -> None:
    first = group.rollouts[0]
    prompt = first.token_ids[: first.prompt_length]
    for rollout in group.rollouts:
        if rollout.prompt_length < 1:
            raise ValueError(f"rollout {rollout.key} has an empty prompt: nothing predicts its first token")
        if not rollout.loss_mask[rollout.prompt_length :].any():
            raise ValueError(f"rollout {rollout.key} has no scored token: leave it out of the step")
        if share_prompts and not np.array_equal(rollout.token_ids[: rollout.prompt_length], prompt):
            raise ValueError(f"rollouts {first.key} and {rollout.key} are one group but their prompts differ")


def _last_scored(rollout: Rollout) -> int:
    return int(np.flatnonzero(rollout.loss_mask)[-1])


def _prefix(part: TrainGroup, share_prompts: bool) -> int:
    # A response on its own shares nothing: its prompt stays in its own rows, one attention call instead of two.
    return part.rollouts[0].prompt_length - 1 if share_prompts and len(part.rollouts) > 1 else 0


def _row_count(part: TrainGroup, share_prompts: bool) -> int:
    prefix = _prefix(part, share_prompts)
    return prefix + sum(_last_scored(r) - prefix for r in part.rollouts)


def _balance(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes` in as few bins as the budget allows."""
    count = max(1, math.ceil(sum(sizes) / budget))
    while True:
        bins = balance(sizes, count)
        if all(len(chosen) == 1 or sum(sizes[i] for i in chosen) <= budget for chosen in bins):
            return sorted(chosen for chosen in bins if chosen)
        count += 1


def balance(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of `sizes` in `bins` bins of nearly equal sums, largest first into the emptiest; each bin in order."""
    heap = [(0, b) for b in range(bins)]
    chosen: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, b = heapq.heappop(heap)
        chosen[b].append(i)
        heapq.heappush(heap, (load + sizes[i], b))
    return [sorted(indices) for indices in chosen]


def share_groups(groups: Sequence[TrainGroup], ranks: Ranks) -> list[TrainGroup]:
    """This rank's groups: nearly equal tokens per rank, the same cut on every rank; may be empty."""
    bins = balance([sum(len(r.token_ids) for r in group.rollouts) for group in groups], ranks.world)
    return [groups[i] for i in bins[ranks.rank]]


def _batch(parts: Sequence[TrainGroup], share_prompts: bool) -> Batch:
    pieces: list[tuple[NDArray, ...]] = []
    spans, row = [], 0
    for part in parts:
        start, prefix, responses = row, _prefix(part, share_prompts), []
        if prefix:
            pieces.append(_rows(part.rollouts[0], 0, prefix))
        row += prefix
        for rollout in part.rollouts:
            end = _last_scored(rollout)
            pieces.append(_rows(rollout, prefix, end))
            responses.append((row, end - prefix))
            row += end - prefix
        spans.append(PromptSpan(start, prefix, tuple(responses)))
    token_ids, positions, target, behavior = (np.concatenate(column) for column in zip(*pieces, strict=True))
    rollouts = [r for part in parts for r in part.rollouts]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        target=target,
        behavior_logprob=behavior,
        rows=np.flatnonzero(target != IGNORE),
        cu_seqlens=np.cumsum([0] + [np.count_nonzero(r.loss_mask) for r in rollouts], dtype=np.int64),
        prompts=tuple(spans),
        advantage=np.concatenate([part.advantage for part in parts]).astype(np.float32),
        keys=tuple(r.key for r in rollouts),
    )


def _rows(rollout: Rollout, first: int, end: int) -> tuple[NDArray, ...]:
    """Token ids, positions, targets and behaviour log-probs of the rows that read tokens [first, end)."""
    mask = rollout.loss_mask[first + 1 : end + 1].astype(np.uint8)
    target = np.where(mask, rollout.token_ids[first + 1 : end + 1].astype(np.int64), IGNORE)
    behavior = np.where(mask, rollout.behavior_logprob[first + 1 : end + 1], np.float32(0)).astype(np.float32)
    return rollout.token_ids[first:end].astype(np.int64), np.arange(first, end), target, behavior
