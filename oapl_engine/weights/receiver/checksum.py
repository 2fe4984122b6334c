"""The checksum of contracts.md over tensors of any layout; the formula and its kernels are oapl_kernels.weight_pack's.

oapl_kernels needs torch alone, so the receiver may load it into vLLM's processes.
"""

from __future__ import annotations

import torch
from oapl_kernels import weight_pack

FLOATS = {2: torch.bfloat16, 4: torch.float32}


def checksum(tensor: torch.Tensor) -> int:
    """64 bits of the bytes of a tensor in row-major order, where it lies."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_cuda and not flat.is_floating_point():
        flat = flat.view(FLOATS[flat.element_size()])
    return weight_pack.checksum(flat)
