"""Which elements of which tensor travel in which bucket, and how a sharded trainer comes by them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from oapl_engine.weights.control import BucketSlice

ALIGNMENT = 64  # bytes
NamedTensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class BucketLayout:
    """What travels in which bucket.

    shapes:  of all tensors by name, in the trainer's order
    slices:  in order
    size:    bytes that a bucket needs
    """

    shapes: dict[str, tuple[int, ...]]
    slices: list[BucketSlice]
    size: int

    def buckets(self) -> list[list[BucketSlice]]:
        grouped: dict[int, list[BucketSlice]] = {}
        for part in self.slices:
            grouped.setdefault(part.bucket, []).append(part)
        return list(grouped.values())


def lay_out(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int) -> BucketLayout:
    """Tensors into buckets of at most bucket_bytes, in order; one larger than a bucket is split between rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    slices: list[BucketSlice] = []
    bucket, offset, size = 0, 0, 0
    room = max(bucket_bytes, ALIGNMENT) // dtype.itemsize  # elements of a bucket
    for name, tensor in skip_tied(tensors):
        shapes[name] = tuple(tensor.shape)
        total, start = tensor.numel(), 0
        step = total if total <= room else room // row_length(tensor) * row_length(tensor) or room
        while start < total:
            count = min(step, total - start)
            if offset and offset + count * dtype.itemsize > bucket_bytes:
                bucket, offset = bucket + 1, 0
            label = name if count == total else f"{name}[{start}:{start + count}]"
            slices.append(BucketSlice(label, name, start, count, bucket, offset))
            size = max(size, offset + count * dtype.itemsize)
            offset += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            start += count
    return BucketLayout(shapes, slices, size)


def row_length(tensor: torch.Tensor) -> int:
    """Elements of tensor[0]."""
    return math.prod(tensor.shape[1:])


def skip_tied(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors without the second names of tied ones; none is kept alive."""
    seen: weakref.WeakValueDictionary[tuple[int, torch.Size], torch.Tensor] = weakref.WeakValueDictionary()
    for name, tensor in tensors:
        key = (id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr(), tensor.shape)  # a shard may be empty
        if key not in seen:
            seen[key] = tensor
            yield name, tensor


@torch.no_grad()
def flat_slice(tensor: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) in row-major order. Of a DTensor they are gathered, each from the rank that holds
    it, on every rank of its mesh: a collective call. Raises ValueError for a sharding other than FSDP2's."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1)[start : start + count]
    local, placements = tensor.to_local().detach().reshape(-1), tensor.placements
    if placements == (Replicate(),):
        return local[start : start + count]
    if placements != (Shard(0),):
        raise ValueError(f"a tensor is placed as {placements}; allowed: (Shard(dim=0),) or (Replicate(),) on one mesh")
    mesh, gathered = tensor.device_mesh, local.new_empty(count)
    held = -(-tensor.shape[0] // mesh.size()) * row_length(tensor)  # elements per rank, fewer on the last ones
    for owner in range(start // held, (start + count - 1) // held + 1):
        first, last = max(start, owner * held), min(start + count, (owner + 1) * held)
        part = gathered[first - start : last - start]
        if owner == mesh.get_local_rank():
            part.copy_(local[first - owner * held : last - owner * held])
        dist.broadcast(part, group=mesh.get_group(), group_src=owner)
    return gathered


def join_gathers(named_tensors: NamedTensors, dtype: torch.dtype, bucket_bytes: int) -> None:
    """What a rank without an engine does while others publish: takes part in the gathers of their buckets."""
    tensors = skip_tied(named_tensors())
    name, tensor = "", torch.empty(0)
    for part in lay_out(named_tensors(), dtype, bucket_bytes).slices:
        while name != part.name:
            name, tensor = next(tensors)
        flat_slice(tensor, part.start, part.length)
