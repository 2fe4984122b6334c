"""The three products of the head, each with fp32 sums (fp64 for fp64), for every dtype and device.

They are the library's, but on CPU it has no bf16 product with fp32 sums: csrc/matmul.cpp has, where the processor can
(and a faster fp32 product for logits). Elsewhere the weight is widened tile by tile: slower, never wrong.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .backend import extension
from .compiler import operation, return_nothing

TILE = 4096  # vocabulary rows widened at a time
AMX_DEPTH = 32  # bf16 values of one row that an AMX tile holds


@cache
def multiplies_natively(dtype: torch.dtype, device_type: str) -> bool:
    """Whether gradients are multiplied in dtype itself. fp16 is not: coefficient * p underflows in it."""
    if dtype == torch.bfloat16:
        return device_type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype in (torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of logits and sums for inputs of dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide_tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    buffer = torch.empty(min(TILE, len(weight)), weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), TILE):
        rows = slice(start, min(start + TILE, len(weight)))
        tile = buffer[: rows.stop - rows.start]
        tile.copy_(weight[rows])
        yield rows, tile


def _has_product(left: Tensor, right: Tensor) -> bool:
    """Whether `product` takes these."""
    cpp = extension()
    if cpp is None or left.device.type != "cpu" or left.dtype != right.dtype:
        return False
    if left.dtype not in (torch.float32, torch.bfloat16) or not cpp.multiplies(left.dtype == torch.bfloat16):
        return False
    return min(left.stride()) == min(right.stride()) == 1


def sums_bf16_in_fp32(left: Tensor, right: Tensor) -> bool:
    """Whether `product` multiplies these gradients: where the processor has AMX, the library's is faster."""
    return left.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported() and _has_product(left, right)


def _library_operand(left: Tensor) -> Tensor:
    """left [m, k], copied where the library's bf16 product on AMX would read beyond the end of its rows.

    There the values are multiplied by zero, but NaN or infinity times zero is NaN. A copy takes a fifth of the time
    that `product` would take.
    """
    complete_tiles = left.shape[1] % AMX_DEPTH == 0 or left.is_contiguous()
    if left.dtype != torch.bfloat16 or left.is_cuda or complete_tiles or not torch.cpu._is_amx_tile_supported():
        return left
    return left.contiguous()


@operation(return_nothing, mutates=("out",))
def product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out [m, n] fp32 = (with add, +=) left [m, k] @ right [k, n], both fp32 or both bf16."""
    cpp = extension()
    assert cpp is not None  # _has_product
    (rows, depth), columns = left.shape, right.shape[1]
    cpp.multiply(
        left.data_ptr(),
        left.stride(),
        right.data_ptr(),
        right.stride()[::-1],
        out.data_ptr(),
        out.stride(0),
        rows,
        columns,
        depth,
        add,
        left.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [t, V] wide = hidden [t, D] @ weight [V, D]^T."""
    if _has_product(hidden, weight):
        product(hidden, weight.t(), out, False)
    elif hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        widened = hidden.to(out.dtype)
        for rows, tile in _wide_tiles(weight):
            torch.mm(widened, tile.t(), out=out[:, rows])


def hidden_product(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [t, D] = grad [t, V] @ weight [V, D]; out in grad's dtype, or narrower."""
    summed = sums_bf16_in_fp32(grad, weight)
    if grad.dtype == weight.dtype == out.dtype and not summed:
        torch.mm(_library_operand(grad), weight, out=out)
        return
    total = torch.empty(*out.shape, dtype=accumulation_dtype(grad.dtype), device=grad.device)
    if summed:
        product(grad, weight, total, False)
    else:
        for rows, tile in _wide_tiles(weight):
            torch.addmm(total, grad[:, rows], tile, beta=float(rows.start > 0), out=total)
    out.copy_(total)


def _accumulate(sums: Tensor, part: Tensor, empty: bool) -> None:
    """sums += part, or = where sums is still empty. torch's own add of bf16 to fp32 takes ten times as long."""
    cpp = extension()
    if cpp is not None and part.dtype == torch.bfloat16 and sums.is_contiguous():
        threads = torch.get_num_threads()
        cpp.accumulate(sums.data_ptr(), part.data_ptr(), sums.numel(), not empty, threads)
    elif empty:
        sums.copy_(part)
    else:
        sums.add_(part)


class WeightGradient:
    """weight [V, D] += grad^T @ hidden and bias [V] += sum of grad, over any number of chunks, in accumulation_dtype.

    Both are uninitialised memory at first, or None where no gradient is wanted.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None):
        self.weight, self.bias, self.empty = weight, bias, True
        self._product: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to add to."""
        return self.weight is not None or self.bias is not None

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """grad [t, V], hidden [t, D]."""
        if self.bias is not None:
            _accumulate(self.bias, grad.sum(0, dtype=self.bias.dtype), self.empty)
        if self.weight is not None:
            self._add_product(self.weight, grad.t(), hidden)
        self.empty = False

    def _add_product(self, into: Tensor, grad: Tensor, hidden: Tensor) -> None:
        keep = 0.0 if self.empty else 1.0
        if sums_bf16_in_fp32(grad, hidden) and into.stride(1) == 1:
            product(grad, hidden, into, not self.empty)
        elif grad.dtype == into.dtype:
            torch.addmm(into, grad, hidden.to(grad.dtype), beta=keep, out=into)
        elif grad.is_cuda:
            torch.addmm(into, grad, hidden, out_dtype=into.dtype, beta=keep, out=into)
        else:
            # The library has no bf16 product with fp32 sums on CPU: a kept temporary, added in fp32.
            if self._product is None:
                self._product = torch.empty(*into.shape, dtype=grad.dtype, device=grad.device)
            torch.mm(grad, hidden, out=self._product)
            _accumulate(into, self._product, self.empty)

    def add_scaled(self, other: "WeightGradient", scale: Tensor) -> None:
        """Add scale () times another gradient."""
        for mine, theirs in ((self.weight, other.weight), (self.bias, other.bias)):
            if mine is None or theirs is None:
                continue
            if self.empty:
                torch.mul(theirs, scale, out=mine)
            else:
                mine.addcmul_(theirs, scale)
        self.empty = False

    def finish(self) -> None:
        """After the last chunk: zeros if there was none."""
        for tensor in (self.weight, self.bias):
            if tensor is not None and self.empty:
                tensor.zero_()
        self.empty = False
