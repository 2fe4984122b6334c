"""Workspace memory, all of it allocated here so that tests can poison it."""

import torch
from torch import Tensor

from . import testing


def workspace(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of this shape."""
    buffer = torch.empty(shape, dtype=dtype, device=device)
    return buffer.fill_(float("nan")) if testing.POISON else buffer


def cast_in_place(source: Tensor, dtype: torch.dtype) -> Tensor:
    """View of the first part of each row of source [n, V] as dtype (no larger than source's own): [n, V]."""
    return source.view(dtype)[:, : source.shape[1]]
