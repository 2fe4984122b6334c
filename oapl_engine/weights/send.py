"""One version of the weights through the buckets of a transport, one bucket packed while the engine takes another."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from oapl_kernels.weight_pack import pack_all

from oapl_engine.stopwatch import Stopwatch
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.bucket_layout import BucketLayout, NamedTensors, flat_slice, skip_tied
from oapl_engine.weights.control import Bucket, BucketSlice
from oapl_engine.weights.transports import Buckets

FilledSlice = tuple[BucketSlice, torch.Tensor]  # and its elements, flat


def send_version(
    layout: BucketLayout,
    named_tensors: NamedTensors,
    dtype: torch.dtype,
    buckets: Buckets,
    announce: Callable[[Bucket], Any],
    clock: Stopwatch,
) -> dict[str, int]:
    """Pack, send and announce every bucket. Returns checksums by label.

    announce: tells the engine of a bucket, returns when the engine has read it, raises what went wrong
    clock:    counts the seconds of phase "pack"

    After a failure the gathers continue, without sending: other ranks of a sharded trainer wait in them.
    """
    expected: dict[str, int] = {}
    under_way: deque[Future[Any]] = deque()
    failure: Exception | None = None
    # On exit the announcer waits: after a failure no bucket of this version may reach the engine later.
    with ThreadPoolExecutor(1, thread_name_prefix="announce") as announcer:
        for slices in _gathered(layout, named_tensors):
            if failure is not None:
                continue
            try:
                if len(under_way) == len(buckets.views):
                    under_way.popleft().result()
                with clock.measure("pack"):
                    bucket = _fill(buckets, slices, dtype)
                under_way.append(announcer.submit(announce, bucket))
                expected |= bucket.checksums
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    for future in under_way:
        future.result()
    return expected


def _fill(buckets: Buckets, slices: list[FilledSlice], dtype: torch.dtype) -> Bucket:
    """The next bucket, packed and handed to the transport, as it is announced to the engine."""
    last, _ = slices[-1]
    index = last.bucket % len(buckets.views)
    buckets.wait(index)
    checksums = _pack(buckets.views[index], slices, dtype)
    length = last.offset + last.length * dtype.itemsize
    buckets.send(index, length)
    return Bucket(last.bucket, length, checksums)


def _pack(view: torch.Tensor, slices: list[FilledSlice], dtype: torch.dtype) -> dict[str, int]:
    """Cast (round to nearest even) into the bucket. Returns checksums by label. Refuses what is not finite."""
    places = [view[part.offset : part.offset + part.length * dtype.itemsize].view(dtype) for part, _ in slices]
    digests = pack_all([source.to(view.device) for _, source in slices], places)
    values = digests.cpu().to(torch.int64) & 0xFFFFFFFF  # waits for the device
    checksums = {}
    for (part, _), (low, high, nonfinite) in zip(slices, values.tolist(), strict=True):
        if nonfinite:
            raise WeightMismatchError(part.name, f"finite values of {dtype}", f"{nonfinite} that are not")
        checksums[part.label] = low | high << 32
    return checksums


def _gathered(layout: BucketLayout, named_tensors: NamedTensors) -> Iterator[list[FilledSlice]]:
    """Slices with their elements, bucket by bucket. WeightMismatchError if a tensor is missing, new or reshaped."""
    offered = skip_tied(named_tensors())
    name, tensor = "", torch.empty(0)
    for slices in layout.buckets():
        bucket = []
        for part in slices:
            if part.name != name:
                name, tensor = _next(offered, part.name, layout.shapes[part.name])
            bucket.append((part, flat_slice(tensor, part.start, part.length)))
        yield bucket
    for name, tensor in offered:
        raise WeightMismatchError(name, "no tensor of this name", f"one of shape {list(tensor.shape)}")


def _next(
    offered: Iterator[tuple[str, torch.Tensor]], expected: str, shape: tuple[int, ...]
) -> tuple[str, torch.Tensor]:
    name, tensor = next(offered, ("nothing", torch.empty(0)))
    if name != expected:
        raise WeightMismatchError(expected, f"a tensor of shape {list(shape)}", f"{name} in its place")
    if tensor.shape != shape:
        raise WeightMismatchError(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
    return name, tensor
