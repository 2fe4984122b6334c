"""Which implementation of the chunk epilogue runs."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch", "cpu")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def extension() -> ModuleType | None:
    """The C++ extension oapl_kernels._cpu, or None where it is not built."""
    return import_module("._cpu", __package__) if find_spec("oapl_kernels._cpu") else None


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can run on the tensor: on a GPU, or on CPU under Triton's interpreter."""
    if not _has_triton():
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch", "triton" or "cpu" for tensors of this device and dtype; ValueError if the asked one cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        if dtype == torch.float64:
            return "torch"
        if device.type == "cuda":
            return "triton" if _has_triton() else "torch"
        return "cpu" if device.type == "cpu" and extension() else "torch"
    if backend != "torch" and dtype == torch.float64:
        raise ValueError(f"backend is {backend!r} with float64 inputs; allowed: 'torch' or 'auto'")
    if backend == "triton":
        if not _has_triton():
            raise ValueError("backend is 'triton' but triton is not installed; allowed: 'torch', or install triton")
        if not runs_triton(torch.empty(0, device=device)):
            raise ValueError(
                f"backend is 'triton' with tensors on {device}; allowed: a CUDA or ROCm device, or TRITON_INTERPRET=1"
            )
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend is 'cpu' with tensors on {device}; allowed: tensors on cpu")
        if extension() is None:
            raise ValueError(
                "backend is 'cpu' but oapl_kernels._cpu is not built; allowed: 'torch', or build the extension"
            )
    return backend


def epilogue(backend: str) -> ModuleType:
    """The module with `statistics` and `gradient` of a chosen backend."""
    return import_module(".epilogue" if backend == "torch" else f".epilogue_{backend}", __package__)
