"""Sums over the sequences of a packed batch."""

from typing import Any

import torch
from torch import Tensor

from .backend import runs_triton
from .checks import FLOATS, INTEGERS, MASKS, check_offsets, check_tensor
from .compiler import operation
from .matmul import accumulation_dtype


def _empty_sums(token_values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    return token_values.new_empty(len(cu_seqlens) - 1, dtype=accumulation_dtype(token_values.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_values, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.tokens, ctx.dtype = len(token_values), token_values.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cu_seqlens, mask = ctx.saved_tensors
    values = grad.repeat_interleave(cu_seqlens.diff().long(), output_size=ctx.tokens)
    values = values if mask is None else torch.where(mask != 0, values, 0)
    return values.to(ctx.dtype), None, None


@operation(_empty_sums, save=_save, backward=_backward)
def sequence_sums(token_values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """`sequence_sum` of at least one sequence."""
    if cu_seqlens.device.type == "cpu":  # on a GPU reading them would wait for it
        check_offsets("cu_seqlens", cu_seqlens, len(token_values), token_values.device, least=0)
    if runs_triton(token_values) and token_values.dtype != torch.float64:
        from .sequence_triton import sums

        return sums(token_values, cu_seqlens, mask)
    values = token_values if mask is None else torch.where(mask != 0, token_values, 0)
    # fp64 accumulation in a fixed order: the error of a compensated fp32 sum, and the same bits on every run.
    totals = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long())
    return totals.to(accumulation_dtype(values.dtype))


def scatter_rows(values: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """values [t, ...] at rows [t] of zeros [tokens, ...], differentiable."""
    return values.new_zeros(tokens, *values.shape[1:]).index_copy(0, rows, values)


def sequence_sum(token_values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of token_values [T] over each sequence -> [N], fp32 (fp64 for fp64), differentiable, deterministic.

    cu_seqlens [N+1] offsets; mask [T] nonzero where a token counts. The sum is as exact as its inputs: for a
    log-ratio subtract per token first, then sum. Offsets may repeat (empty sequences).
    """
    check_tensor("token_values", token_values, (None,), FLOATS, getattr(token_values, "device", None))
    check_tensor("cu_seqlens", cu_seqlens, (None,), INTEGERS, token_values.device)
    if mask is not None:
        check_tensor("mask", mask, (len(token_values),), MASKS, token_values.device)
    if len(cu_seqlens) <= 1:
        return token_values.new_zeros(0, dtype=accumulation_dtype(token_values.dtype))
    return sequence_sums(token_values, cu_seqlens, mask)
