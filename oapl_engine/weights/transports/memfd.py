"""Buckets in anonymous memory of the trainer's process, mapped by an engine on the same host: nothing moves.

Nothing stays behind: no name in /dev/shm, no file, and Docker's small /dev/shm does not matter.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import torch

from oapl_engine.weights.transports import BucketOptions, BucketReader, Buckets, ReaderOptions, Transport

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # the size is fixed; the bytes are refilled


class MemfdBuckets(Buckets):
    """Two buffers of `size` bytes each, size sealed."""

    def __init__(self, options: BucketOptions) -> None:
        self.size = options.size
        self._fds = [self._make(self.size) for _ in range(2)]
        self.views = [torch.frombuffer(mmap.mmap(fd, self.size), dtype=torch.uint8) for fd in self._fds]

    @staticmethod
    def _make(size: int) -> int:
        fd = os.memfd_create("oapl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
        return fd

    def describe(self) -> dict[str, Any]:
        """The engine opens /proc/<pid>/fd/<fd>, which only our own user may."""
        return {"pid": os.getpid(), "fds": self._fds, "size": self.size}

    def close(self) -> None:
        """Give the memory back once the engine has unmapped it too."""
        self.views = []
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class MemfdReader(BucketReader):
    """Maps the trainer's memory. Raises ValueError where it is not what was announced."""

    def __init__(self, options: ReaderOptions) -> None:
        described = options.description
        self.buffers = [self._map(described["pid"], fd, described["size"]) for fd in described["fds"]]

    @staticmethod
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


TRANSPORT = Transport(MemfdBuckets, MemfdReader)
