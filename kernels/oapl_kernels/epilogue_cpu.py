"""The functions of `epilogue` in C++ (csrc/epilogue.cpp): fp32 logits, one visit of each row, torch's thread count."""

import torch
from torch import Tensor

from . import _cpu  # type: ignore[attr-defined]
from .epilogue import cast_in_place


def _logits(logits: Tensor, target: Tensor, temperature: float, softcap: float | None) -> _cpu.Logits:
    rows, vocabulary = logits.shape
    return _cpu.Logits(
        logits.data_ptr(), logits.stride(0), rows, vocabulary, target.data_ptr(), temperature, softcap or 0.0
    )


def statistics(logits: Tensor, target: Tensor, temperature: float, softcap: float | None, out: Tensor) -> None:
    """As `epilogue.statistics`; target int64, contiguous."""
    described = _logits(logits, target, temperature, softcap)
    _cpu.statistics(described, out.data_ptr(), out.stride(0), torch.get_num_threads())


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
    coefficient = coefficient.float().contiguous()
    entropy_row = None if entropy_coefficient is None else entropy_coefficient.float().contiguous()
    _cpu.gradient(
        _logits(logits, target, temperature, softcap),
        stats.data_ptr(),
        stats.stride(0),
        coefficient.data_ptr(),
        0 if entropy_row is None else entropy_row.data_ptr(),
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return cast_in_place(logits, dtype)
