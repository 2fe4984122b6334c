"""Buckets broadcast to the ranks of an engine: nccl between GPUs and across nodes, gloo its CPU equivalent.

NCCL refuses two ranks on one GPU, and a peer that dies poisons its communicator: after any failure the publisher makes
new buckets, and with them a new group.
"""

from __future__ import annotations

import datetime
import functools
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from oapl_engine.weights.transports import BucketOptions, BucketReader, Buckets, ReaderOptions, Transport

TIMEOUT = datetime.timedelta(seconds=60)  # of joining and of one bucket; gloo notices a dead peer immediately


class BroadcastBuckets(Buckets):
    """Two buffers and a thread that sends them.

    backend:  "gloo" | "nccl"
    host:     address of this node that the engine can reach; the store of the group listens there and nowhere else
    """

    def __init__(self, backend: str, options: BucketOptions, host: str = "127.0.0.1") -> None:
        self.views = [torch.zeros(options.size, dtype=torch.uint8, device=BACKENDS[backend].device) for _ in range(2)]
        self._listener = socket.create_server((host, 0))
        self._description = {
            "backend": backend,
            "host": host,
            "port": self._listener.getsockname()[1],
            "ranks": 1 + options.ranks,
            "size": options.size,
        }
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        self._sent: dict[int, Future[None]] = {}
        self._group: Any = None

    def describe(self) -> dict[str, Any]:
        return self._description

    def send(self, index: int, length: int) -> None:
        """On a thread: the engine joins in when it hears of the bucket."""
        self._sent[index] = self._sender.submit(self._broadcast, self.views[index][:length])

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

    def _broadcast(self, bucket: torch.Tensor) -> None:
        if self._group is None:
            self._group = join_group(self._description, 0, self._listener.detach())
        broadcast(self._group, bucket)


class BroadcastReader(BucketReader):
    """Takes part in a broadcast of each bucket."""

    def __init__(self, options: ReaderOptions) -> None:
        self.description, self.rank = options.description, options.rank
        fixed = BACKENDS[self.description["backend"]].reader_device
        device = options.device if fixed is None else fixed
        self.buffers = [torch.empty(self.description["size"], dtype=torch.uint8, device=device) for _ in range(2)]
        self.group: Any = None

    def wait_for(self, index: int, length: int) -> None:
        if self.group is None:
            self.group = join_group(self.description, 1 + self.rank)
        broadcast(self.group, self.buffers[index][:length])

    def close(self) -> None:
        self.buffers = []
        if self.group is not None:
            self.group.abort()
            self.group = None


def join_group(description: dict[str, Any], rank: int, listener: int | None = None) -> Any:
    """The process group that description {"backend", "host", "port", "ranks"} names; blocks until every rank is there.

    listener: file descriptor of the bound socket, for rank 0. Independent of the groups of vLLM and of the trainer, and
    not one of torch.distributed's own. Raises RuntimeError (torch's DistError) when a rank does not come.
    """
    host, size = description["host"], description["ranks"]
    master = {} if listener is None else {"is_master": True, "master_listen_fd": listener}
    store = dist.TCPStore(host, description["port"], size, timeout=TIMEOUT, wait_for_workers=False, **master)
    return BACKENDS[description["backend"]].make_group(store, rank, size, host)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Rank 0's tensor to every rank; complete on return. Raises RuntimeError when a peer is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
    group.broadcast([tensor], options).wait()
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


class _Gloo:
    device = "cpu"
    reader_device: torch.device | None = torch.device("cpu")

    @staticmethod
    def make_group(store: Any, rank: int, size: int, host: str) -> Any:
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        near = host.startswith("127.")  # then nothing of ours listens beyond this host
        options._devices = [gloo.create_device(hostname=host) if near else gloo.create_default_device()]
        options._timeout = TIMEOUT
        return gloo(store, rank, size, options)


class _Nccl:
    device = "cuda"
    reader_device: torch.device | None = None  # that of the engine's parameters

    @staticmethod
    def make_group(store: Any, rank: int, size: int, host: str) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options)


BACKENDS: dict[str, Any] = {"gloo": _Gloo, "nccl": _Nccl}
GLOO = Transport(functools.partial(BroadcastBuckets, "gloo"), BroadcastReader)
NCCL = Transport(functools.partial(BroadcastBuckets, "nccl"), BroadcastReader, needs_cuda=True)
