"""Fresh memory that holds NaN instead of what chance left there: a read before a write shows in every result."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from oapl_kernels import matmul
from oapl_kernels.backend import extension

ROWS, DEPTH = 384, 256  # at least as large as the two blocks that csrc/matmul.cpp keeps (BLOCK, DEPTH)


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty and its kin, also inside torch's operations; numpy.empty; the blocks that C++ keeps.

    Integers get their largest value.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # It fills fresh memory too (torch.utils.deterministic.fill_uninitialized_memory is on by default).
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill_in_numpy = {name: _filled(getattr(np, name)) for name in ("empty", "empty_like")}
    try:
        with mock.patch.multiple(np, **fill_in_numpy):
            _fill_blocks()
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _filled(allocate):
    def fill(*arguments, **keywords):
        made = allocate(*arguments, **keywords)
        if made.dtype.kind in "fc":
            made.fill(np.nan)
        elif made.dtype.kind in "iu":
            made.fill(np.iinfo(made.dtype).max)
        return made

    return fill


def _fill_blocks() -> None:
    """The product of NaN leaves its packed operands behind, in the blocks that the next product takes."""
    cpp = extension()
    if cpp is not None and cpp.multiplies(False):
        left, right = torch.full((ROWS, DEPTH), torch.nan), torch.full((DEPTH, ROWS), torch.nan)
        matmul.product(left, right, torch.zeros(ROWS, ROWS), False)
