"""One optimizer step as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from oapl_kernels import Objective, PolicyLoss
from torch import Tensor

from oapl_engine.config import RunError
from oapl_engine.samples import Batch
from oapl_engine.trainer.head import policy_loss
from oapl_engine.trainer.model import Policy


class NonFiniteError(RunError):
    """A NaN or Inf in reward, log-prob, loss or gradient. The weights, and the optimizer's state, are untouched."""


@dataclass(frozen=True)
class StepResult:
    """stepped: False where a non-finite number made the step skip itself, `reason` says which and where.

    metrics: the contract's names that follow from the step; None = not measured, or not finite.
    """

    stepped: bool
    reason: str | None
    metrics: dict[str, float | None]


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    learning_rate: float,
    normalizer: float,
    temperature: float = 1.0,
    clip_norm: float = float("inf"),
    entropy_coefficient: float = 0.0,
    beta2: float | None = None,
    nonfinite: str = "stop",
) -> StepResult:
    """One optimizer step over all micro-batches: the gradient is that of the summed loss / normalizer, exactly.

    normalizer: sequences (or what the objective divides by) of the whole step on all ranks; beta2: of a squared
    residual (oapl, kimi), for `residual_mean`. A non-finite number raises NonFiniteError before the weights change, or
    with nonfinite="skip" gives a result that says so; gradients are cleared either way.
    """
    try:
        _check_inputs(batches)
        losses = accumulate_gradients(
            policy,
            batches,
            objective,
            normalizer=normalizer,
            temperature=temperature,
            entropy_coefficient=entropy_coefficient,
        )
        _check_losses(batches, losses)
        norm = _check_gradients(policy, batches)
    except NonFiniteError as error:
        optimizer.zero_grad(set_to_none=False)
        if nonfinite == "stop":
            raise
        return StepResult(False, str(error), {})
    _clip(policy, norm, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    # Kept, not freed: on CPU fresh memory costs more in page faults than the zeroing.
    optimizer.zero_grad(set_to_none=False)
    return StepResult(True, None, _metrics(batches, losses, float(norm), beta2))


def accumulate_gradients(
    policy: Policy,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    normalizer: float,
    temperature: float = 1.0,
    entropy_coefficient: float = 0.0,
) -> list[PolicyLoss]:
    """Add the gradient of the summed loss / normalizer to every parameter's .grad; the micro-batches' losses."""
    losses = []
    for batch in batches:
        with policy.precision():
            loss = policy_loss(
                policy.head,
                policy.hidden(batch),
                batch,
                objective,
                normalizer=normalizer,
                temperature=temperature,
                entropy_coefficient=entropy_coefficient,
            )
        loss.loss.backward()
        losses.append(PolicyLoss(*(part.detach() for part in loss)))
    return losses


def _check_inputs(batches: Sequence[Batch]) -> None:
    for batch in batches:
        _refuse("reward or advantage", batch, np.flatnonzero(~np.isfinite(batch.advantage)))
        wrong = np.flatnonzero(~np.isfinite(batch.behavior_logprob[batch.rows]))
        _refuse("behaviour log-prob", batch, np.searchsorted(batch.cu_seqlens, wrong, "right") - 1)


def _check_losses(batches: Sequence[Batch], losses: Sequence[PolicyLoss]) -> None:
    for batch, loss in zip(batches, losses, strict=True):
        wrong = torch.nonzero(~torch.isfinite(loss.sequence_logprob))[:, 0]
        _refuse("log-prob", batch, wrong.cpu().numpy())
        _refuse("loss", batch, np.arange(0 if torch.isfinite(loss.loss) else len(batch.keys)))


def _refuse(what: str, batch: Batch, sequences: np.ndarray) -> None:
    if len(sequences):
        keys = ", ".join(batch.keys[i] for i in dict.fromkeys(sequences.tolist()))
        raise NonFiniteError(f"{what} is NaN or Inf in rollouts {keys}: the step is refused, the weights are unchanged")


def _check_gradients(policy: Policy, batches: Sequence[Batch]) -> Tensor:
    """The global gradient norm, unclipped."""
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    if not torch.isfinite(norm):
        names = [name for name, g in gradients.items() if not torch.isfinite(g).all()] or ["the global norm"]
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise NonFiniteError(
            f"gradient of {names[0]} is NaN or Inf in a step of rollouts {keys}: the step is refused, the weights are "
            "unchanged"
        )
    return norm


def _clip(policy: Policy, norm: Tensor, clip_norm: float) -> None:
    if clip_norm < float("inf"):
        torch.nn.utils.clip_grads_with_norm_(policy.trainable().values(), clip_norm, norm)


def _metrics(
    batches: Sequence[Batch], losses: Sequence[PolicyLoss], norm: float, beta2: float | None
) -> dict[str, float | None]:
    pairs = list(zip(batches, losses, strict=True))
    log_ratio = np.concatenate([loss.logprob.double().cpu().numpy() - b.behavior_logprob[b.rows] for b, loss in pairs])
    entropy = torch.cat([loss.entropy.double().cpu() for loss in losses])
    sums = np.add.reduceat(log_ratio, _starts(batches))
    advantage = np.concatenate([batch.advantage for batch in batches])
    metrics = {
        "loss": sum(float(loss.loss) for loss in losses),
        "residual_mean": None if beta2 is None else float(np.mean(beta2 * sums - advantage)),
        "entropy": float(entropy.mean()),
        "grad_norm": norm,
        "log_ratio_mean": float(log_ratio.mean()),
        "log_ratio_std": float(log_ratio.std()),
        "log_ratio_max": float(np.abs(log_ratio).max()),
        "tokens_trained": float(len(log_ratio)),
    }
    return {name: value if value is not None and np.isfinite(value) else None for name, value in metrics.items()}


def _starts(batches: Sequence[Batch]) -> np.ndarray:
    lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches])
    return np.cumsum(lengths) - lengths
