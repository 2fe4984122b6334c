"""Weights on this device: CUDA IPC into another process, and a broadcast over NCCL."""

import socket

import torch

from benchmarks._gpu.plain_engine import PlainEngine
from benchmarks._gpu.report import DEVICE, DRY, HALF, write_row
from benchmarks._plain_model import PlainModel, Size, named_shapes
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.control import Inspect
from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.receiver.update import InPlaceUpdate
from oapl_engine.weights.transports import make_buckets
from oapl_engine.weights.transports.broadcast import broadcast, join_group

# 1.84e9 parameters, 3.7 GB as served
SIZE = Size(2, 64, 128, 500) if DRY else Size(28, 2048, 6144, 151936)
TRANSPORT, BACKEND = ("memfd", "gloo") if DRY else ("cuda_ipc", "nccl")
VERSIONS = 3


def check_publish() -> None:
    """Three versions into a receiver in another process, equal to a fresh load; then a wrong checksum is refused."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = named_shapes(SIZE)
    tensors = {name: torch.randn(shape, device=DEVICE, generator=generator) for name, shape in shapes.items()}
    for megabytes in (1,) if DRY else (64, 512):
        engine = PlainEngine(SIZE, DEVICE)
        publisher = Publisher(
            tensors.items,
            engine,
            bucket_bytes=megabytes << 20,
            dtype=HALF,
            make_buckets=lambda size: make_buckets(TRANSPORT, size),
        )
        try:
            _publish(publisher, engine, tensors, megabytes)
        finally:
            publisher.close()
            engine.close()


def _publish(publisher: Publisher, engine: PlainEngine, tensors: dict[str, torch.Tensor], megabytes: int) -> None:
    for version in range(VERSIONS):
        for tensor in tensors.values():
            tensor.mul_(1.01)
        report = publisher.publish(version)
    identical = engine.update(Inspect()).reports == [_loaded_checksums(tensors)]
    engine.corrupt = True
    refused = ""
    try:
        publisher.publish(VERSIONS)
    except (RuntimeError, WeightMismatchError) as error:
        refused = f"{type(error).__name__}: {str(error)[:90]}"
    write_row(
        "weights",
        bucket_mb=megabytes,
        bytes=report.bytes,
        identical=identical,
        refused=refused,
        gb_per_s=report.bytes / report.seconds["total"] / 1e9,
        changed=report.changed_share,
        seconds={phase: round(seconds, 4) for phase, seconds in report.seconds.items()},
    )


def _loaded_checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of a model that loads the tensors without a publisher."""
    model = PlainModel(SIZE, DEVICE)
    model.load_weights(tensors.items())
    return InPlaceUpdate(model).parameter_checksums()


def check_broadcast() -> None:
    """Constructor, options, broadcast and abort of the real backend, in a group of one: NCCL wants a GPU per rank."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    group = join_group({"backend": BACKEND, "host": "127.0.0.1", "port": port, "ranks": 1}, 0, listener.detach())
    values = torch.arange(1000, device=DEVICE).to(torch.uint8)
    broadcast(group, values)
    group.abort()
    write_row("nccl", backend=BACKEND, intact=bool((values.cpu() == torch.arange(1000).to(torch.uint8)).all()))
