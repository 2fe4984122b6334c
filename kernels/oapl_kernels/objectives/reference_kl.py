"""A KL penalty to a frozen reference, added to any objective."""

from dataclasses import replace

import torch
from torch import Tensor

from .objective import Objective, PolicyInputs, require


def with_reference_kl(objective: Objective, coefficient: float, mean_per_sequence: bool = False) -> Objective:
    """objective + coefficient * sum_t [exp(d) - d - 1], d = ln pi_ref - ln pi: the estimator of GRPO
    (arXiv 2402.03300, eq. 4; "k3", Schulman 2020). Needs inputs.reference_logprob."""
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"coefficient is {coefficient}; allowed: a finite number >= 0")
    if objective.token_fn is not None:
        raise ValueError(f"objective {objective.name!r} already has a token_fn; allowed: one per objective")

    def token_fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        difference = require("reference_logprob", inputs.reference_logprob, "reference_kl") - logprob
        return coefficient * inputs.token_loss(torch.expm1(difference) - difference, mean_per_sequence)

    needs = (*objective.needs, "reference_logprob")
    return replace(objective, name=f"{objective.name}+reference_kl", token_fn=token_fn, needs=needs)
