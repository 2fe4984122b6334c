"""Sums over sequences in Triton: one program a sequence, fp32 with compensation, the same bits on every run."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch

BLOCK, WARPS = 1024, 4


@triton.jit
def sum_sequence(values, offsets, mask, sums, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """sums [N] = sum of values over each sequence (Kahan, lane by lane)."""
    sequence = tl.program_id(0)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        valid = start + lane < end
        if MASKED:
            valid = valid & (tl.load(mask + start + lane, mask=valid, other=0) != 0)
        value = tl.load(values + start + lane, mask=valid, other=0.0).to(tl.float32) - lost
        new = total + value
        lost = (new - total) - value
        total = new
    tl.store(sums + sequence, tl.sum(total, 0) - tl.sum(lost, 0))


def sums(values: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:
    """values [T] (not fp64), offsets [N+1], mask [T] -> [N] fp32."""
    out = torch.empty(len(offsets) - 1, dtype=torch.float32, device=values.device)
    values, offsets = values.contiguous(), offsets.contiguous()
    mask = None if mask is None else (mask != 0).to(torch.uint8).contiguous()
    launch(
        sum_sequence,
        (len(out),),
        values,
        offsets,
        values if mask is None else mask,
        out,
        BLOCK=BLOCK,
        MASKED=mask is not None,
        num_warps=WARPS,
    )
    return out
