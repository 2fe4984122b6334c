"""The functions of `epilogue` in Triton: one program per row, fp32 logits, in place."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import cast_in_place
from .launches import INTERPRETED, launch

BLOCK, WARPS = 4096, 8


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def tanh(u):
    """Cephes' odd polynomial near 0, else 1 - 2 / (exp(2|u|) + 1)."""
    size = tl.minimum(tl.abs(u), 20.0)
    q = u * u
    p = q * -5.70498872745e-3 + 2.06390887954e-2
    p = p * q + -5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q + -3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, p * q * u + u, tl.where(u < 0, -far, far))


@triton.jit
def scaled(z, inverse_temperature, softcap, CAP: tl.constexpr):
    """x = softcap(z) / temperature."""
    if CAP:
        z = tanh(z / softcap) * softcap
    return z * inverse_temperature


@triton.jit
def merge(top, total, weighted, x, valid):
    """Running max, sum of exp(x - max) and sum of exp(x - max) * (x - max), lane by lane, with one more block."""
    new = tl.maximum(top, x)
    down = tl.where(top == -float("inf"), 0.0, top - new)
    factor = tl.where(top == -float("inf"), 0.0, tl.exp(down))
    d = tl.where(valid & (x > -float("inf")), x - new, 0.0)
    p = tl.where(valid & (x > -float("inf")), tl.exp(d), 0.0)
    # A NaN logit passes no comparison: let it through to the sum.
    p = tl.where(x != x, x, p)
    return new, total * factor + p, factor * (weighted + down * total) + p * d


@triton.jit
def collapse(top, total, weighted):
    """The lanes' running values as one: max, ln sum, entropy."""
    highest = tl.max(top, 0)
    down = tl.where(top == -float("inf"), 0.0, top - highest)
    factor = tl.where(top == -float("inf"), 0.0, tl.exp(down))
    total_all = tl.sum(total * factor, 0)
    weighted_all = tl.sum(factor * (weighted + down * total), 0)
    log_sum = tl.log(total_all)
    return highest, log_sum, log_sum - weighted_all / total_all


@triton.jit
def row_statistics(
    logits,
    target,
    out,
    vocabulary,
    stride,
    out_stride,
    inverse_temperature,
    softcap,
    BLOCK: tl.constexpr,
    CAP: tl.constexpr,
):
    """out [4, rows] = log-prob, entropy, max, ln sum exp(x - max) of each row of logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        valid = begin + lane < vocabulary
        z = tl.load(logits + begin + lane, mask=valid, other=0.0)
        x = tl.where(valid, scaled(z, inverse_temperature, softcap, CAP), -float("inf"))
        top, total, weighted = merge(top, total, weighted, x, valid)
    highest, log_sum, entropy = collapse(top, total, weighted)
    chosen = tl.load(target + row)
    z = tl.load(logits + tl.maximum(chosen, 0))
    logprob = scaled(z, inverse_temperature, softcap, CAP) - highest - log_sum
    tl.store(out + row, tl.where(chosen < 0, 0.0, logprob))
    tl.store(out + out_stride + row, entropy)
    tl.store(out + 2 * out_stride + row, highest)
    tl.store(out + 3 * out_stride + row, log_sum)


@triton.jit
def one_minus_exp(logprob):
    """1 - exp(l) for l <= 0 without cancellation near 0."""
    series = 1.0 + logprob / 7
    series = 1.0 + logprob / 6 * series
    series = 1.0 + logprob / 5 * series
    series = 1.0 + logprob / 4 * series
    series = 1.0 + logprob / 3 * series
    series = 1.0 + logprob / 2 * series
    return tl.where(logprob > -0.35, -logprob * series, 1.0 - tl.exp(logprob))


@triton.jit
def log_probability(z, highest, log_sum, inverse_temperature, softcap, CAP: tl.constexpr):
    """ln p of each logit, finite for a logit of -inf."""
    d = scaled(z, inverse_temperature, softcap, CAP) - highest - log_sum
    return tl.where(d < -1e30, -1e30, d)


@triton.jit
def row_gradient(
    logits,
    gradient,
    target,
    stats,
    coefficient,
    entropy_coefficient,
    vocabulary,
    stride,
    gradient_stride,
    stats_stride,
    inverse_temperature,
    softcap,
    BLOCK: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """gradient [rows, V], which starts where logits do and is not wider, = d loss / d logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    chosen = tl.load(target + row)
    logprob = tl.load(stats + row)
    highest = tl.load(stats + 2 * stats_stride + row)
    log_sum = tl.load(stats + 3 * stats_stride + row)
    a = tl.load(coefficient + row) * inverse_temperature
    at_target = a * one_minus_exp(logprob)
    if ENTROPY:
        entropy = tl.load(stats + stats_stride + row)
        e = tl.load(entropy_coefficient + row) * inverse_temperature
        at_target -= e * tl.exp(logprob) * (logprob + entropy)
    lane = tl.arange(0, BLOCK)
    for begin in range(0, vocabulary, BLOCK):
        valid = begin + lane < vocabulary
        z = tl.load(logits + begin + lane, mask=valid, other=0.0)
        # A bf16 row is stored over logits that another warp may not have read yet.
        tl.debug_barrier()
        d = log_probability(z, highest, log_sum, inverse_temperature, softcap, CAP)
        g = tl.exp(d) * (-a - e * (d + entropy) if ENTROPY else -a)
        g = tl.where(begin + lane == chosen, at_target, g)
        if CAP:
            t = tanh(z / softcap)
            g *= 1.0 - t * t
        tl.store(gradient + begin + lane, round_to(g, gradient.dtype.element_ty, INTERPRETED), mask=valid)


def statistics(logits: Tensor, target: Tensor, temperature: float, softcap: float | None, out: Tensor) -> None:
    """As `epilogue.statistics`."""
    launch(
        row_statistics,
        (len(logits),),
        logits,
        target,
        out,
        logits.shape[1],
        logits.stride(0),
        out.stride(0),
        1.0 / temperature,
        softcap or 1.0,
        BLOCK=BLOCK,
        CAP=softcap is not None,
        num_warps=WARPS,
    )


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
    """As `epilogue.gradient`, for dtype fp32 or bf16."""
    result = cast_in_place(logits, dtype)
    coefficient = coefficient.float().contiguous()
    entropy_row = coefficient if entropy_coefficient is None else entropy_coefficient.float().contiguous()
    launch(
        row_gradient,
        (len(logits),),
        logits,
        result,
        target,
        stats,
        coefficient,
        entropy_row,
        logits.shape[1],
        logits.stride(0),
        result.stride(0),
        stats.stride(0),
        1.0 / temperature,
        softcap or 1.0,
        BLOCK=BLOCK,
        CAP=softcap is not None,
        ENTROPY=entropy_coefficient is not None,
        INTERPRETED=INTERPRETED,
        num_warps=WARPS,
    )
    return result
