"""Is the version that the engine holds the version that the trainer sent, and does the engine compute with it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import RunError

Logprobs = NDArray[np.float32]

# mean |difference| of probe log-probs, nats per token: rounding noise is 1e-5 (float32) and 3e-2 (bfloat16)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
STALENESS_SHARE = (
    0.1  # share of the tolerance: a smaller move of log-probs could hide below the rounding of bfloat16 logits
)


class WeightMismatchError(RunError):
    """A version was refused; the engine serves nothing until a complete one arrives. parameter: the one at fault."""

    def __init__(self, parameter: str, expected: str, found: str) -> None:
        super().__init__(
            f"{parameter}: expected {expected}, found {found}; the engine stays paused until a complete version"
        )
        self.parameter, self.expected, self.found = parameter, expected, found


@dataclass(frozen=True)
class ProbePrompts:
    """Prompts whose log-probs show that the engine computes what the trainer computes.

    token_ids:         2 or more per prompt
    trainer_logprobs:  (token_ids) -> for each prompt f32 log-probs [len - 1] of its tokens but the first, at
                       temperature 1, under the weights being published
    tolerance:         mean |difference| in nats per token
    """

    token_ids: Sequence[Sequence[int]]
    trainer_logprobs: Callable[[Sequence[Sequence[int]]], list[Logprobs]]
    tolerance: float


@dataclass(frozen=True)
class LogprobGap:
    """Engine against trainer on the probe prompts, nats per token.

    mean, max:  of |difference| of log-probs
    k3:         mean of r - 1 - ln r with r = π_trainer / π_engine, an estimate of their KL divergence (Schulman, 2020)
    """

    mean: float
    max: float
    k3: float


def check_checksums(expected: dict[str, int], reports: Sequence[dict[str, Any]]) -> None:
    """Every rank must hold every tensor bit for bit. Raises WeightMismatchError."""
    for rank, report in enumerate(reports):
        for name, value in expected.items():
            found = report["checksums"].get(name)
            if found != value:
                shown = "nothing" if found is None else f"{found:016x}"
                raise WeightMismatchError(name, f"checksum {value:016x}", f"{shown} in rank {rank} of the engine")


def check_probes(tolerance: float, engine: list[Logprobs], trainer: list[Logprobs]) -> LogprobGap:
    """The engine's probe log-probs against the trainer's. Raises WeightMismatchError past the tolerance, or at NaN."""
    for number, (ours, theirs) in enumerate(zip(trainer, engine, strict=True)):
        difference = float(np.abs(np.asarray(ours) - theirs).mean())
        if not difference <= tolerance:
            what = f"log-probs within {tolerance} nats per token of the trainer's"
            raise WeightMismatchError(f"probe prompt {number}", what, f"a mean difference of {difference:.4g}")
    gap = np.concatenate(engine) - np.concatenate(trainer)
    k3 = float(np.mean(np.expm1(-gap.astype(np.float64)) + gap))
    return LogprobGap(float(np.abs(gap).mean()), float(np.abs(gap).max()), k3)


def check_staleness(
    tolerance: float,
    engine: list[Logprobs],
    trainer: list[Logprobs],
    before: tuple[list[Logprobs], list[Logprobs]] | None,
) -> None:
    """Where the trainer's probe log-probs moved visibly, the engine's must have moved at all. before: those of engine
    and trainer at the version before. Raises WeightMismatchError."""
    if before is None or any(not np.array_equal(now, old) for now, old in zip(engine, before[0], strict=True)):
        return
    moved = float(np.abs(np.concatenate(trainer) - np.concatenate(before[1])).mean())
    if moved > tolerance * STALENESS_SHARE:
        what = f"new log-probs, as the trainer's moved by {moved:.3g} nats per token"
        raise WeightMismatchError("probe prompts", what, "those of the version before, bit for bit")
