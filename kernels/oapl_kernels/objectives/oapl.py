"""OAPL (arXiv 2602.19362): a squared residual of the sequence log-ratio against the advantage."""

from torch import Tensor

from .objective import Objective, PolicyInputs, positive


def oapl(beta2: float) -> Objective:
    """OAPL (arXiv 2602.19362): sum_i (beta2 * sum_t [ln pi - ln pi_vllm] - A_i)^2, with A_i = r_i - V(x).

    No length normalisation, importance weight or clip; divided by N sequences it is the paper's loss.
    """
    positive("beta2", beta2)

    def fn(logprob: Tensor, inputs: PolicyInputs) -> Tensor:
        log_ratio = inputs.per_sequence(logprob - inputs.behavior_logprob)
        return (beta2 * log_ratio - inputs.advantage).square().sum()

    return Objective("oapl", "sequence", fn, baseline="value", log_ratio_weight=beta2)
