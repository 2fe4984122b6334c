"""The receiving end of the transports: maps the trainer's buckets into this process."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import torch

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def attach(description: dict[str, Any]) -> list[torch.Tensor]:
    """One u8 tensor [size] a bucket buffer, for what transports.memfd describes. Raises ValueError, OSError."""
    if description["transport"] != "memfd":
        raise ValueError(f"transport {description['transport']!r}: this engine knows memfd")
    return [_map(description["pid"], fd, description["size"]) for fd in description["fds"]]


def _map(pid: int, number: int, size: int) -> torch.Tensor:
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(fd).st_size
        if found != size:
            raise ValueError(f"bucket of process {pid} has {found} bytes, {size} were announced")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SIZE_SEALS != SIZE_SEALS:
            raise ValueError(f"bucket of process {pid} is not sealed in size: it could shrink under us")
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
    finally:
        os.close(fd)
