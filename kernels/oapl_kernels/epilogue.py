"""What happens to a chunk of logits, in place: statistics of each row, then its gradient. Plain torch.

The other backends (epilogue_cpu, epilogue_triton) have the same two functions, and this one is their reference.
Per row, with x = softcap(z) / temperature, d_j = ln p_j and H the entropy:
    dz_j = [ a * (1[j = y] - p_j) - e * p_j * (d_j + H) ] / temperature * (1 - (softcap(z_j) / c)^2)
where a is d loss / d log-prob and e is d loss / d H. p is exp((x - max) - log_sum): with logits of 1e4 the
log-sum-exp itself has an fp32 rounding of 1e-3, its two parts have none.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LOWEST = -1e30  # d of a logit of -inf: finite, so that p * d is 0 and not NaN


def cast_in_place(source: Tensor, dtype: torch.dtype) -> Tensor:
    """View of the first part of each row of source [n, V] as dtype (no larger than source's own): [n, V]."""
    return source.view(dtype)[:, : source.shape[1]]


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    elements = 1 << 20 if logits.device.type == "cpu" else 1 << 26  # temporaries stay in cache, launches stay few
    step = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))


def _scaled(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    x = z if softcap is None else (z / softcap).tanh_().mul_(softcap)
    return x if temperature == 1.0 else x / temperature


def statistics(logits: Tensor, target: Tensor, temperature: float, softcap: float | None, out: Tensor) -> None:
    """out [4, t] = log-prob, entropy, max, log_sum of each row; target -1: no target here, log-prob 0."""
    for rows in _row_blocks(logits):
        x, index = _scaled(logits[rows], temperature, softcap), target[rows, None]
        logprob, entropy, maximum, log_sum = out[:, rows]
        maximum.copy_(x.amax(1))
        d = (x - maximum[:, None]).clamp_min_(LOWEST)
        p = d.exp()
        total = p.sum(1)
        log_sum.copy_(total.log())
        entropy.copy_(log_sum - p.mul_(d).sum(1) / total)
        chosen = x.gather(1, index.clamp_min(0))[:, 0] - maximum - log_sum
        logprob.copy_(torch.where(index[:, 0] < 0, 0, chosen))


def gradient(
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    coefficient: Tensor,
    entropy_coefficient: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite logits with dz in dtype; returned as a view [t, V] of the same memory."""
    result = cast_in_place(logits, dtype)
    for rows in _row_blocks(logits):
        z, index = logits[rows], target[rows, None]
        logprob, entropy, maximum, log_sum = (row[:, None] for row in stats[:, rows])
        a = coefficient[rows, None] / temperature
        x = _scaled(z, temperature, softcap)
        slope = None if softcap is None else 1 - (x * (temperature / softcap)).square_()
        d = (x - maximum).sub_(log_sum).clamp_min_(LOWEST)
        if entropy_coefficient is None:
            at_target = -a * torch.expm1(logprob)  # 1 - p without cancellation where p is near 1
            d.exp_().mul_(-a)
        else:
            e = entropy_coefficient[rows, None] / temperature
            at_target = -a * torch.expm1(logprob) - e * logprob.exp() * (logprob + entropy)
            factor = (d + entropy).mul_(-e).sub_(a)
            d.exp_().mul_(factor)
        own = d.gather(1, index.clamp_min(0))
        d.scatter_(1, index.clamp_min(0), torch.where(index < 0, own, at_target))
        if slope is not None:
            d.mul_(slope)
        result[rows].copy_(d)
    return result
