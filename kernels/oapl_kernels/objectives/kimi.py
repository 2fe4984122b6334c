"""Policy mirror descent of Kimi k1.5 (arXiv 2501.12599, eq. 2 and 3)."""

from torch import Tensor

from .objective import Objective, PolicyInputs, positive


def kimi(beta2: float) -> Objective:
    """Policy mirror descent (arXiv 2501.12599, eq. 2 and 3): sum_i (r_i - mean(r) - beta2 * log-ratio_i)^2.

    OAPL with the group mean as value (`group_advantage(..., beta1=inf)`); beta2 is the paper's tau.
    """
    positive("beta2", beta2)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        log_ratio = inputs.per_sequence(logprob - inputs.behavior_logprob)
        return (inputs.advantage - beta2 * log_ratio).square().sum()

    return Objective("kimi", "sequence", fn, baseline="mean", log_ratio_weight=beta2)
