"""The process group of one publisher (rank 0) and the ranks of one engine: nccl, or gloo, its twin on CPU."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)  # of joining and of one bucket; a dead peer is noticed at once by gloo


def join(description: dict[str, Any], rank: int, listener: int | None = None) -> Any:
    """The group that description {"transport", "host", "port", "ranks"} names; blocks until every rank is there.

    listener: file descriptor of the bound socket, for rank 0. Beside the groups of vLLM and of the trainer, not one of
    torch.distributed's own. Raises RuntimeError (torch's DistError) when a rank does not come.
    """
    host, size = description["host"], description["ranks"]
    more = {} if listener is None else {"is_master": True, "master_listen_fd": listener}
    store = dist.TCPStore(host, description["port"], size, timeout=TIMEOUT, wait_for_workers=False, **more)
    if description["transport"] == "gloo":
        options = dist.ProcessGroupGloo._Options()
        near = host.startswith("127.")  # then nothing of ours listens beyond this host
        gloo = dist.ProcessGroupGloo
        options._devices = [gloo.create_device(hostname=host) if near else gloo.create_default_device()]
        options._timeout = TIMEOUT
        return dist.ProcessGroupGloo(store, rank, size, options)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Rank 0's tensor to every rank; complete on return. Raises RuntimeError when a peer is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
    group.broadcast([tensor], options).wait()
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
