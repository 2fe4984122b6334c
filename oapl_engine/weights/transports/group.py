"""Buckets broadcast to the ranks of an engine: nccl between GPUs and across nodes, gloo as its twin on CPU.

NCCL refuses two ranks on one GPU, and a peer that dies poisons its communicator: after any failure the publisher makes
new buckets, and with them a new group.
"""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from oapl_engine.weights.receiver.group import broadcast, join
from oapl_engine.weights.transports import Buckets


class GroupBuckets(Buckets):
    """Two buffers and a thread that sends them. host: address of this node that the engine can reach; the store of the
    group listens there and nowhere else."""

    def __init__(self, transport: str, size: int, ranks: int, host: str = "127.0.0.1") -> None:
        device = "cpu" if transport == "gloo" else "cuda"
        self.views = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._listener = socket.create_server((host, 0))
        port = self._listener.getsockname()[1]
        self._description = {"transport": transport, "host": host, "port": port, "ranks": 1 + ranks, "size": size}
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        self._sent: dict[int, Future[None]] = {}
        self._group: Any = None

    def describe(self) -> dict[str, Any]:
        return self._description

    def send(self, index: int, length: int) -> None:
        """On a thread: the engine joins in when it hears of the bucket."""
        self._sent[index] = self._sender.submit(self._broadcast, self.views[index][:length])

    def _broadcast(self, bucket: torch.Tensor) -> None:
        if self._group is None:
            self._group = join(self._description, 0, self._listener.detach())
        broadcast(self._group, bucket)

    def wait(self, index: int) -> None:
        if index in self._sent:
            self._sent.pop(index).result()

    def close(self) -> None:
        self.views = []
        if self._group is not None:
            self._group.abort()
            self._group = None  # closes its sockets, which is what tells the peers
        self._listener.close()
        self._sender.shutdown(wait=False, cancel_futures=True)
