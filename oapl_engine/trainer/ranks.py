"""The trainer ranks of a run (`torchrun --nproc-per-node N`): every one runs the same program and holds the policy.

A step's groups go to every rank (token ids: small), so all find the same advantages, drops and normaliser; each then
trains a share of nearly equal tokens, and gradients are summed. Messages travel over gloo as tensors; nothing pickles.
"""

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from oapl_engine.samples import Group
from oapl_engine.trainer.packing import Item, balance


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Alone, every method returns at once with its own argument."""

    rank: int = 0
    world: int = 1

    @property
    def suffix(self) -> str:
        """Of names of files that concern this rank's own rollouts and engine: ".rankN", nothing for the first."""
        return f".rank{self.rank}" if self.rank else ""

    def gather(self, payload: bytes) -> list[bytes]:
        """Everyone's payload, by rank. Collective, as all methods here: every rank must call it."""
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

    def gather_plain(self, value: Any) -> list[Any]:
        """Everyone's value of plain types (numbers, text, lists, dicts), by rank."""
        return [msgspec.msgpack.decode(part) for part in self.gather(msgspec.msgpack.encode(value))]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all ranks, in place; every rank then holds the same bits."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def groups(self, own: Sequence[Group], order: Sequence[str]) -> list[Group]:
        """All ranks' groups, in the order of ids `order`. Raises KeyError where nobody has one."""
        parts = self.gather(msgspec.msgpack.encode(own, enc_hook=_encode_array))
        found = {g.id: g for part in parts for g in msgspec.msgpack.decode(part, type=list[Group], dec_hook=_decode)}
        return [found[key] for key in order]

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's items: nearly equal tokens a rank, the same cut on every rank; may be empty."""
        bins = balance([sum(len(r.token_ids) for r in item.rollouts) for item in items], self.world)
        return [items[i] for i in bins[self.rank]]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The ranks that torchrun started, joined; ALONE without torchrun or with one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart of its ranks: an attempt without a name of its own reads addresses of the dead
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    atexit.register(dist.destroy_process_group)  # else gloo's threads may abort a run that is done
    return Ranks(dist.get_rank(), world)


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tobytes()]
    raise NotImplementedError(f"{type(value).__name__} does not travel between ranks")


def _decode(kind: Any, value: Any) -> Any:
    return np.frombuffer(value[1], value[0])
