"""The engine's ends of the transports: each gives the trainer's bytes as `buffers`, complete after `take`."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import torch

from oapl_engine.weights.receiver.cuda_memory import CudaMemory
from oapl_engine.weights.receiver.group import broadcast, join

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Inbox:
    """buffers: one u8 tensor a bucket buffer."""

    buffers: list[torch.Tensor]

    def take(self, index: int, length: int) -> None:
        """The first `length` bytes of a buffer are there from now on. Nothing to do where they are announced last."""

    def close(self) -> None:
        self.buffers = []


def open_inbox(description: dict[str, Any], rank: int, device: torch.device) -> Inbox:
    """The inbox for what a transport's describe() says, in rank `rank` of the engine. Raises ValueError, OSError."""
    transport = description["transport"]
    if transport == "memfd":
        return MemfdInbox(description)
    if transport == "file":
        return FileInbox(description)
    if transport in ("gloo", "nccl"):
        return GroupInbox(description, rank, torch.device("cpu") if transport == "gloo" else device)
    if transport == "cuda_ipc":
        return CudaInbox(description)
    raise ValueError(f"transport {transport!r}: this engine knows memfd, file, gloo, nccl and cuda_ipc")


class MemfdInbox(Inbox):
    """Maps the trainer's anonymous memory: nothing moves."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.buffers = [self._map(description["pid"], fd, description["size"]) for fd in description["fds"]]

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


class FileInbox(Inbox):
    """Reads each bucket from a file in a folder that trainer and engine see."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.paths = [Path(path) for path in description["paths"]]
        self.buffers = [torch.empty(description["size"], dtype=torch.uint8) for _ in self.paths]

    def take(self, index: int, length: int) -> None:
        path = self.paths[index]
        with open(path, "rb", buffering=0) as file:
            place = memoryview(self.buffers[index][:length].numpy())
            while len(place) and (count := file.readinto(place)):
                place = place[count:]
            if len(place) or file.read(1):
                raise ValueError(f"{path} has {os.fstat(file.fileno()).st_size} bytes, {length} were announced")


class GroupInbox(Inbox):
    """Takes part in a broadcast of each bucket, over gloo or nccl."""

    def __init__(self, description: dict[str, Any], rank: int, device: torch.device) -> None:
        self.description, self.rank = description, rank
        self.buffers = [torch.empty(description["size"], dtype=torch.uint8, device=device) for _ in range(2)]
        self.group: Any = None

    def take(self, index: int, length: int) -> None:
        if self.group is None:
            self.group = join(self.description, 1 + self.rank)
        broadcast(self.group, self.buffers[index][:length])

    def close(self) -> None:
        self.buffers = []
        if self.group is not None:
            self.group.abort()
            self.group = None


class CudaInbox(Inbox):
    """Maps the trainer's device memory. take() orders our stream after the record that came before the announcement."""

    driver = CudaMemory()

    def __init__(self, description: dict[str, Any]) -> None:
        self.buffers = [self.driver.open(memory) for memory in description["memory"]]
        self.events = [self.driver.open_event(e, self.buffers[0].device) for e in description["events"]]

    def take(self, index: int, length: int) -> None:
        self.events[index].wait()

    def close(self) -> None:
        self.buffers, self.events = [], []
