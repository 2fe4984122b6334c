"""From hidden states to log-probs and losses: only rows that predict a sampled token reach the vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oapl_kernels import Objective, PolicyInputs, PolicyLoss, fused_policy_loss, linear_logprob
from torch import Tensor, nn

from oapl_engine.samples import Batch


@dataclass(frozen=True)
class Head:
    """log-prob = log_softmax(softcap(scale * (hidden @ weight.T + bias)) / temperature); weight [V, D], bias [V]."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def options(self, temperature: float) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "temperature": temperature / self.scale}


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM: its output embeddings and what its config does to logits afterwards."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(output.weight, getattr(output, "bias", None), softcap, scale)


def policy_loss(
    head: Head,
    hidden: Tensor,
    batch: Batch,
    objective: Objective,
    *,
    normalizer: float,
    temperature: float,
    entropy_coefficient: float = 0.0,
) -> PolicyLoss:
    """Loss and log-probs of a batch's R scored rows, from hidden [T, D]; PolicyLoss as in oapl_kernels, its T our R.

    A float32 head's weight gradient is added straight to `weight.grad`, in float32, whatever the matmul precision.
    """
    rows, target = _rows(batch, hidden.device), _scored(batch.target, batch, hidden.device)
    optional = {
        name: _scored(values, batch, hidden.device)
        for name in ("proximal_logprob", "reference_logprob")
        if (values := getattr(batch, name)) is not None
    }
    inputs = PolicyInputs(
        _scored(batch.behavior_logprob, batch, hidden.device),
        torch.from_numpy(batch.advantage).to(hidden.device),
        **optional,
    )
    weight = head.weight
    return fused_policy_loss(
        hidden.index_select(0, rows),
        weight,
        target,
        torch.from_numpy(batch.cu_seqlens).to(hidden.device),
        objective,
        inputs,
        normalizer=normalizer,
        entropy_coefficient=entropy_coefficient,
        weight_grad=_gradient(weight) if weight.requires_grad and torch.is_grad_enabled() else None,
        **head.options(temperature),
    )


def row_logprob(head: Head, hidden: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Log-probs [R] f32 of a batch's scored rows, from hidden [T, D]."""
    rows, target = _rows(batch, hidden.device), _scored(batch.target, batch, hidden.device)
    return linear_logprob(hidden.index_select(0, rows), head.weight, target, **head.options(temperature))


def _rows(batch: Batch, device: torch.device) -> Tensor:
    return torch.from_numpy(batch.rows).to(device)


def _scored(values: NDArray[np.generic], batch: Batch, device: torch.device) -> Tensor:
    return torch.from_numpy(values[batch.rows]).to(device)


def _gradient(weight: Tensor) -> Tensor | None:
    if weight.dtype not in (torch.float32, torch.float64):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
