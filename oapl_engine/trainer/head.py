"""From hidden states to log-probs and losses: only rows that predict a sampled token reach the vocabulary head."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oapl_kernels import Objective, PolicyInputs, PolicyLoss, fused_policy_loss, linear_logprob
from torch import Tensor
from transformers import PreTrainedModel

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


# What transformers' configs call the numbers between a head's product and its logits.
FACTORS, DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def get_head(network: PreTrainedModel) -> Head:
    """A causal LM's output embeddings and what its config does to logits afterwards.

    Not all models use such a field in the same way: loading compares log-probs with the model's own.
    """
    output, config = network.get_output_embeddings(), network.config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        return [value for n in names if isinstance(value := getattr(config, n, None), int | float) and value]

    scale = math.prod(numbers(FACTORS)) / math.prod(numbers(DIVISORS))
    return Head(output.weight, getattr(output, "bias", None), next(iter(numbers(SOFTCAPS)), None), scale)


def policy_loss(
    head: Head,
    hidden: Tensor,
    batch: Batch,
    objective: Objective,
    *,
    normalizer: float,
    temperature: float = 1.0,
    entropy_coefficient: float = 0.0,
) -> PolicyLoss:
    """Loss and log-probs of a batch's R scored rows, from hidden [T, D]; PolicyLoss as in oapl_kernels, its T our R.

    A float32 head's weight gradient is added straight to `weight.grad`, in float32, whatever the matmul precision.
    """

    def there(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(hidden.device)

    names = ("behavior_logprob", "proximal_logprob", "reference_logprob")
    logprobs = {n: there(values[batch.rows]) for n in names if (values := getattr(batch, n)) is not None}
    inputs = PolicyInputs(advantage=there(batch.advantage), **logprobs)
    weight, weight_grad = head.weight, None
    if weight.requires_grad and torch.is_grad_enabled() and weight.dtype in (torch.float32, torch.float64):
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight_grad = weight.grad
    return fused_policy_loss(
        hidden.index_select(0, there(batch.rows)),
        weight,
        there(batch.target[batch.rows]),
        there(batch.cu_seqlens),
        objective,
        inputs,
        normalizer=normalizer,
        entropy_coefficient=entropy_coefficient,
        weight_grad=weight_grad,
        **head.options(temperature),
    )


def row_logprob(head: Head, hidden: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Log-probs [R] f32 of a batch's scored rows, from hidden [T, D]."""
    rows, target = (torch.from_numpy(x).to(hidden.device) for x in (batch.rows, batch.target[batch.rows]))
    return linear_logprob(hidden.index_select(0, rows), head.weight, target, **head.options(temperature))
