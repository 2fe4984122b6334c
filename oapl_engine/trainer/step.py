"""One optimizer step as a function."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from oapl_kernels import Objective, PolicyLoss
from torch import Tensor

from oapl_engine.distributed import ALONE, Ranks
from oapl_engine.errors import RunError
from oapl_engine.samples import Batch
from oapl_engine.trainer.head import policy_loss
from oapl_engine.trainer.policy import Policy

REFUSED = "the step is refused, the weights are unchanged"


class NonFiniteError(RunError):
    """A NaN or Inf in reward, log-prob, loss or gradient. The weights, and the optimizer's state, are untouched."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    stepped:  False where a non-finite number made the step skip itself
    reason:   which number, and where; None if stepped
    metrics:  those that follow from the step; None: not measured, or not finite
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
    nonfinite: str = "stop",
    ranks: Ranks = ALONE,
) -> StepResult:
    """One optimizer step over all micro-batches: the gradient is that of the summed loss / normalizer, exactly.

    batches:     this rank's, none at all included; the gradient is summed over the ranks
    normalizer:  sequences (or what the objective divides by) of the complete step on all ranks
    nonfinite:   "stop": a non-finite number raises NonFiniteError before the weights change; "skip": the result says so

    Gradients are cleared either way.
    """
    how = {"normalizer": normalizer, "temperature": temperature, "entropy_coefficient": entropy_coefficient}
    try:
        losses = _checked_gradients(policy, batches, objective, how, ranks)
        norm = _check_gradients(policy, batches)
    except NonFiniteError as error:
        optimizer.zero_grad(set_to_none=False)
        if nonfinite == "stop":
            raise
        return StepResult(False, str(error), {})
    if clip_norm < float("inf"):
        torch.nn.utils.clip_grads_with_norm_(policy.trainable().values(), clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    # Kept, not freed: on CPU fresh memory costs more in page faults than the zeroing.
    optimizer.zero_grad(set_to_none=False)
    return StepResult(True, None, _metrics(batches, losses, float(norm), objective, ranks))


def _checked_gradients(
    policy: Policy, batches: Sequence[Batch], objective: Objective, how: dict[str, float], ranks: Ranks
) -> list[PolicyLoss]:
    """The micro-batches' losses; every .grad is the complete step's. What one rank finds not finite, all refuse."""
    losses: list[PolicyLoss] = []
    problem = None
    try:
        for batch in batches:
            _refuse("reward or advantage", batch, np.flatnonzero(~np.isfinite(batch.advantage)))
            wrong = np.flatnonzero(~np.isfinite(batch.behavior_logprob[batch.rows]))
            _refuse("behaviour log-prob", batch, np.searchsorted(batch.cu_seqlens, wrong, "right") - 1)
        losses = accumulate_gradients(policy, batches, objective, **how)
        for batch, loss in zip(batches, losses, strict=True):
            _refuse("log-prob", batch, (~torch.isfinite(loss.sequence_logprob)).nonzero()[:, 0].cpu().numpy())
            _refuse("loss", batch, np.arange(0 if torch.isfinite(loss.loss) else len(batch.keys)))
    except NonFiniteError as error:
        problem = str(error)
    problems = [found for found in ranks.gather(problem) if found]
    if problems:
        raise NonFiniteError(problems[0])
    sum_gradients(policy, ranks)
    return losses


def sum_gradients(policy: Policy, ranks: Ranks) -> None:
    """Add up .grad over the ranks. A rank without micro-batches gives zeros; what no rank has stays None."""
    if ranks.world == 1:
        return
    parameters = list(policy.trainable().values())
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
    ranks.sum_([present])
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_(p.grad for p in parameters if p.grad is not None)


def accumulate_gradients(
    policy: Policy, batches: Sequence[Batch], objective: Objective, **how: float
) -> list[PolicyLoss]:
    """Add the gradient of the summed loss / normalizer to every parameter's .grad; the micro-batches' losses.

    how: normalizer, temperature (1) and entropy_coefficient (0) of head.policy_loss.
    """
    losses = []
    for batch in batches:
        with policy.precision():
            loss = policy_loss(policy.head, policy.hidden(batch), batch, objective, **how)
        loss.loss.backward()
        losses.append(PolicyLoss(*(part.detach() for part in loss)))
    return losses


def _refuse(what: str, batch: Batch, sequences: np.ndarray) -> None:
    if len(sequences):
        keys = ", ".join(batch.keys[i] for i in dict.fromkeys(sequences.tolist()))
        raise NonFiniteError(f"{what} is NaN or Inf in rollouts {keys}: {REFUSED}")


def _check_gradients(policy: Policy, batches: Sequence[Batch]) -> Tensor:
    """The global gradient norm, unclipped."""
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    if not torch.isfinite(norm):
        names = [name for name, g in gradients.items() if not torch.isfinite(g).all()] or ["the global norm"]
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise NonFiniteError(f"gradient of {names[0]} is NaN or Inf in a step of rollouts {keys}: {REFUSED}")
    return norm


def _metrics(
    batches: Sequence[Batch], losses: Sequence[PolicyLoss], norm: float, objective: Objective, ranks: Ranks
) -> dict[str, float | None]:
    """Metrics of the complete step. Collective."""
    beta2 = objective.log_ratio_weight
    own = [_sums(batch, loss, beta2 or 0.0) for batch, loss in zip(batches, losses, strict=True)]
    every = [sums for rank in ranks.gather(own) for sums in rank]
    total = {name: sum(sums[name] for sums in every) for name in every[0]}
    tokens = total["tokens"]
    mean = total["log_ratio"] / tokens
    metrics = {
        "loss": total["loss"],
        "residual/mean": None if beta2 is None else total["residual"] / total["sequences"],
        "entropy/all/mean": total["entropy"] / tokens,
        "optim/grad_norm": norm,
        "log_ratio/mean": mean,
        "log_ratio/std": np.sqrt(max(0.0, total["square"] / tokens - mean**2)),
        "log_ratio/max": max(sums["largest"] for sums in every),
        "tokens/trained": tokens,
        "beta2": beta2,
    }
    return {name: float(v) if v is not None and np.isfinite(v) else None for name, v in metrics.items()}


def _sums(batch: Batch, loss: PolicyLoss, beta2: float) -> dict[str, float]:
    """Of one micro-batch, what its metrics are means of.

    loss, entropy:       summed
    tokens, sequences:   trained
    log_ratio, square:   sums of ln π - ln π_vllm and of its square
    residual:            sum of beta2·log-ratio - A, for objectives with a squared residual
    largest:             absolute log-ratio
    """
    log_ratio = loss.logprob.double().cpu().numpy() - batch.behavior_logprob[batch.rows]
    residual = beta2 * np.add.reduceat(log_ratio, batch.cu_seqlens[:-1]) - batch.advantage
    return {
        "loss": float(loss.loss),
        "entropy": float(loss.entropy.double().sum()),
        "tokens": len(log_ratio),
        "sequences": len(residual),
        "log_ratio": float(log_ratio.sum()),
        "square": float((log_ratio**2).sum()),
        "residual": float(residual.sum()),
        "largest": float(np.abs(log_ratio).max()),
    }
