"""What a policy-gradient objective is: a summed loss on the log-probs of complete sequences, and what it needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sequence import sequence_sum


@dataclass(frozen=True)
class PolicyInputs:
    """What an objective sees next to the log-probs: T packed tokens, N sequences.

    behavior_logprob [T]   log-probs of the policy that generated the tokens (0 where mask is 0)
    advantage [N]          one advantage per sequence
    proximal_logprob [T]   log-probs at the start of the optimizer step (decoupled PPO, TIS)
    reference_logprob [T]  log-probs of a frozen reference (KL penalty)
    mask [T]               nonzero where a token is trained; None means everywhere
    cu_seqlens [N+1]       offsets of the sequences; `fused_policy_loss` fills it in
    """

    behavior_logprob: Tensor
    advantage: Tensor
    proximal_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def offsets(self) -> Tensor:
        """cu_seqlens, which must be there."""
        if self.cu_seqlens is None:
            raise ValueError("cu_seqlens is None; allowed: offsets [N+1], which fused_policy_loss fills in")
        return self.cu_seqlens

    def per_token(self, values: Tensor) -> Tensor:
        """values [N] -> [T]: each sequence's value at each of its tokens."""
        return values.repeat_interleave(self.offsets().diff(), output_size=len(self.behavior_logprob))

    def per_sequence(self, values: Tensor) -> Tensor:
        """values [T] -> [N]: sums over each sequence's trained tokens."""
        return sequence_sum(values, self.offsets(), self.mask)

    def lengths(self) -> Tensor:
        """Trained tokens of each sequence [N], at least 1 so that one can divide by it."""
        return self.per_sequence(torch.ones_like(self.behavior_logprob)).clamp_min(1)

    def token_loss(self, values: Tensor, mean_per_sequence: bool) -> Tensor:
        """Sum of per-token losses [T] over trained tokens; with mean_per_sequence each sequence counts 1/|o_i|."""
        sums = self.per_sequence(values)
        return (sums / self.lengths() if mean_per_sequence else sums).sum()

    def sequences(self, start: int, end: int, first_token: int, last_token: int) -> "PolicyInputs":
        """The sequences [start, end), whose tokens are [first_token, last_token)."""

        def tokens(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first_token:last_token]

        return replace(
            self,
            behavior_logprob=tokens(self.behavior_logprob),
            advantage=self.advantage[start:end],
            proximal_logprob=tokens(self.proximal_logprob),
            reference_logprob=tokens(self.reference_logprob),
            mask=tokens(self.mask),
            cu_seqlens=self.offsets()[start : end + 1] - first_token,
        )

    def rows(self, rows: Tensor, cu_seqlens: Tensor) -> "PolicyInputs":
        """These tokens of the same sequences."""
        names = ("behavior_logprob", "proximal_logprob", "reference_logprob", "mask")
        values = {name: getattr(self, name) for name in names}
        kept = {name: None if value is None else value[rows] for name, value in values.items()}
        return replace(self, cu_seqlens=cu_seqlens, **kept)


ALLOWED = {
    "scope": ("token", "sequence"),
    "baseline": ("value", "mean", "zscore"),
    "normalizer": ("sequences", "tokens", "constant"),
}
LossFunction = Callable[[Tensor, PolicyInputs], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss on log-probs, and what a trainer must know to use it.

    name              for messages
    scope             "token": the loss separates over tokens (the derivative at a token depends on that token's
                      log-prob alone, apart from the inputs), so the gradient is known as soon as the token is.
                      "sequence": the derivative is one scalar for all trained tokens of a sequence, known at its end
    fn                (logprob [t], inputs) -> (), summed over complete sequences, not yet normalised
    token_fn          a token-separable term added to fn, for instance a KL penalty on a sequence objective
    baseline          what is taken from a reward to make its advantage: "value" (V of OAPL, `group_advantage`),
                      "mean" of the group, "zscore" (mean, and divided by the standard deviation, `grpo_advantage`)
    normalizer        what the summed loss is divided by: "sequences" N, trained "tokens", or "constant" (N times one
                      length)
    needs             optional fields of PolicyInputs that must be filled in, for instance ("proximal_logprob",)
    log_ratio_weight  beta2 of a squared residual (beta2 * log-ratio - A)^2; None for any other loss
    """

    name: str
    scope: str
    fn: LossFunction
    token_fn: LossFunction | None = None
    baseline: str = "zscore"
    normalizer: str = "sequences"
    needs: tuple[str, ...] = ()
    log_ratio_weight: float | None = None

    def __post_init__(self) -> None:
        for field, allowed in ALLOWED.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} of objective {self.name!r} is {value!r}; allowed: {', '.join(allowed)}")


def require(name: str, values: Tensor | None, objective: str) -> Tensor:
    """The optional input `name`, or a ValueError that says which objective needs it."""
    if values is None:
        raise ValueError(f"{name} is None, but objective {objective!r} needs it [T]: set PolicyInputs({name}=...)")
    return values


def positive(name: str, value: float) -> float:
    """value, or a ValueError if it is not a positive finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; allowed: a finite number > 0")
    return float(value)


def clip_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The interval [1 - clip_low, 1 + clip_high] that a ratio is clipped to."""
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"clip_low, clip_high are {clip_low}, {clip_high}; allowed: 0 <= clip_low <= 1, clip_high >= 0"
        )
    return 1 - clip_low, 1 + clip_high
