"""How buckets reach an engine: the trainer's ends of the transports. The engine's are in receiver/inbox.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class Buckets:
    """Two buffers, filled in turn. views: u8 tensors [size] to fill."""

    views: list[torch.Tensor]

    def describe(self) -> dict[str, Any]:
        """What receiver.inbox.open_inbox needs: plain JSON."""
        raise NotImplementedError

    def send(self, index: int, length: int) -> None:
        """The first `length` bytes of a view are complete; called just before the engine is told. Nothing to do where
        the engine reads them in place."""

    def wait(self, index: int) -> None:
        """Until a view may be filled again, after the engine answered; its answer comes after its last read."""

    def close(self) -> None:
        """Nothing is left behind."""
        raise NotImplementedError


def make_buckets(transport: str, size: int, folder: Path | None = None, ranks: int = 1) -> Buckets:
    """Buckets of `size` bytes. transport: "auto" (cuda_ipc where there is CUDA, else memfd), "memfd", "file" (in
    `folder`, or a temporary one), "gloo", "nccl", "cuda_ipc"; ranks: of the engine. Raises ValueError."""
    check_transport(transport)
    if transport == "auto":
        transport = "cuda_ipc" if torch.cuda.is_available() else "memfd"
    if transport == "memfd":
        from oapl_engine.weights.transports.memfd import MemfdBuckets

        return MemfdBuckets(size)
    if transport == "file":
        from oapl_engine.weights.transports.file import FileBuckets

        return FileBuckets(size, folder)
    if transport in ("gloo", "nccl"):
        from oapl_engine.weights.transports.group import GroupBuckets

        return GroupBuckets(transport, size, ranks)
    if transport == "cuda_ipc":
        from oapl_engine.weights.transports.cuda_ipc import CudaBuckets

        return CudaBuckets(size)
    raise ValueError(f"transport is {transport!r}; allowed: auto, memfd, file, gloo, nccl, cuda_ipc")


def check_transport(transport: str) -> None:
    """ValueError for one that cannot work on this machine."""
    if transport in ("nccl", "cuda_ipc") and not torch.cuda.is_available():
        raise ValueError(f'transport = "{transport}", but there is no CUDA device; allowed here: memfd, file, gloo')
