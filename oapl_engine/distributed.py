"""The ranks of a run (`torchrun --nproc-per-node N`): gather, broadcast, sum. Knows nothing of what they carry.

Every rank runs the same program. Messages travel over gloo as tensors; nothing is pickled.
"""

import atexit
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from oapl_engine.errors import RunError

# A rank waits as long as another evaluates, generates its share or restarts its engine, which may be hours; PyTorch's
# own limits, 30 minutes over gloo and 10 over NCCL, would end the run. A rank that dies is torchrun's to notice.
LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Alone, every method returns its own argument."""

    rank: int = 0
    world: int = 1

    @property
    def suffix(self) -> str:
        """Of names of files that concern this rank's own rollouts and engine: ".rankN", nothing for the first."""
        return f".rank{self.rank}" if self.rank else ""

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """All ranks' payloads, by rank. Collective, as all methods here: every rank must call it."""
        if self.world == 1:
            return [payload]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(payload)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else padded[:0]
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values of plain types (numbers, text, lists, dicts), by rank."""
        return [msgspec.msgpack.decode(part) for part in self.gather_bytes(msgspec.msgpack.encode(value))]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of plain types, on every rank; what the others give is ignored."""
        return self.gather(value if self.rank == 0 else None)[0]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all ranks, in place; every rank then holds the same bits."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


ALONE = Ranks()


def own_gpus(environment: Mapping[str, str], visible: int, each: int) -> range:
    """Which of the `visible` GPUs of this machine are this rank's: the `each` that its engine is split over.

    Its trainer uses the first of them. Raises RunError where there are not enough.
    """
    local = int(environment["LOCAL_RANK"]) if environment.get("WORLD_SIZE", "1") != "1" else 0
    own = range(local * each, (local + 1) * each)
    if own.stop > visible:
        raise RunError(
            f"rank {local} of this machine needs GPUs {own.start} to {own.stop - 1}, and {visible} are visible: start "
            "fewer ranks (--nproc-per-node), lower rollout.tensor_parallel, or see CUDA_VISIBLE_DEVICES"
        )
    return own


def join_ranks(gpus: int = 1) -> Ranks:
    """The ranks that torchrun started, joined; ALONE without torchrun or with one process. gpus: of each rank.

    Calls of Ranks raise torch.distributed's errors where another rank is gone, or does not answer in LONGEST_WAIT.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpus(os.environ, torch.cuda.device_count(), gpus).start)
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart of its ranks: an attempt without a name of its own reads addresses of the dead
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LONGEST_WAIT)
    atexit.register(dist.destroy_process_group)  # else gloo's threads may abort a run that is done
    return Ranks(dist.get_rank(), world)
