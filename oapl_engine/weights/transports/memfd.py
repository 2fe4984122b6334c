"""Buckets in anonymous memory of this process, mapped by an engine on the same host. Nothing stays behind: no name in
/dev/shm, no file, and Docker's small /dev/shm does not matter."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import torch

from oapl_engine.weights.transports import Buckets

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # the size is fixed; the bytes are refilled


class MemfdBuckets(Buckets):
    """`count` buffers of `size` bytes each, size sealed."""

    def __init__(self, size: int, count: int = 2) -> None:
        self.size = size
        self._fds = [self._make(size) for _ in range(count)]
        self.views = [torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8) for fd in self._fds]

    @staticmethod
    def _make(size: int) -> int:
        fd = os.memfd_create("oapl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd

    def describe(self) -> dict[str, Any]:
        """The engine opens /proc/<pid>/fd/<fd>, which only our own user may."""
        return {"transport": "memfd", "pid": os.getpid(), "fds": self._fds, "size": self.size}

    def close(self) -> None:
        """Give the memory back once the engine has unmapped it too."""
        self.views = []
        for fd in self._fds:
            os.close(fd)
        self._fds = []
