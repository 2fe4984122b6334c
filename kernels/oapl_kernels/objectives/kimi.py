from torch import Tensor

from .objective import Objective, PolicyInputs, positive


def kimi(tau: float) -> Objective:
    """Policy mirror descent of Kimi k1.5 (arXiv 2501.12599, eq. 2 and 3): sum_i (r_i - mean(r) - tau * log-ratio_i)^2.

    OAPL with the group mean as value (`group_advantage(..., beta1=inf)`) and beta2 = tau.
    """
    positive("tau", tau)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        log_ratio = inputs.per_sequence(logprob - inputs.behavior_logprob)
        return (inputs.advantage - tau * log_ratio).square().sum()

    return Objective("kimi", "sequence", fn)
