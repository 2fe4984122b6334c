"""The checksum of contracts.md over tensors of any layout; the formula and its kernels are oapl_kernels.weight_pack's.

oapl_kernels needs torch alone, so the receiver may load it into vLLM's processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from oapl_kernels import weight_pack

FLOATS = {2: torch.bfloat16, 4: torch.float32}


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """64 bits each of the bytes of tensors in row-major order, where they lie."""
    return weight_pack.checksum_all([_as_floats(tensor.detach().contiguous().view(-1)) for tensor in tensors])


def _as_floats(flat: torch.Tensor) -> torch.Tensor:
    """What the GPU's kernel reads; other integers are hashed on the CPU only."""
    return flat.view(FLOATS[flat.element_size()]) if flat.is_cuda and not flat.is_floating_point() else flat
