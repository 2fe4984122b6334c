"""Buckets in the trainer's GPU memory, mapped by an engine on the same node that sees the same GPU.

A wait on a shared event orders a stream only after a record that was already issued: send() records, and the
announcement that follows it is what makes the engine's wait mean anything. No event is needed for the way back: the
engine answers after the checksum of what it wrote has come to its host.
"""

from __future__ import annotations

from typing import Any

import torch

from oapl_engine.weights.transports import BucketOptions, BucketReader, Buckets, ReaderOptions, Transport

EXPANDABLE = b"e"  # torch writes the kind of segment into the first bytes of a handle


class CudaMemory:
    """The driver behind transport cuda_ipc; tests put a model of it in its place."""

    def allocate(self, size: int) -> torch.Tensor:
        """u8 [size] on this process's device, zeroed."""
        return torch.zeros(size, dtype=torch.uint8, device="cuda")

    def export(self, memory: torch.Tensor) -> dict[str, Any]:
        """What open() needs in another process. Raises ValueError where the allocator cannot share."""
        _, handle, size, offset, counter, counter_offset, event, sync = memory.untyped_storage()._share_cuda_()
        if EXPANDABLE in handle[:2]:
            raise ValueError(
                "cuda_ipc: this process allocates expandable segments, which the engine cannot map; unset "
                "expandable_segments in PYTORCH_CUDA_ALLOC_CONF, or use transport nccl"
            )
        uuid = str(torch.cuda.get_device_properties(memory.device).uuid)
        parts = [handle.hex(), size, offset, counter.hex(), counter_offset, event.hex(), sync]
        return {"device": uuid, "storage": parts}

    def open(self, description: dict[str, Any]) -> torch.Tensor:
        """The u8 tensor that another process exported. Raises ValueError if its device or the process is not there."""
        handle, size, offset, counter, counter_offset, event, sync = description["storage"]
        blobs = bytes.fromhex(handle), bytes.fromhex(counter), bytes.fromhex(event)
        index = self._index(description["device"])
        torch.cuda.init()
        try:
            storage = torch.UntypedStorage._new_shared_cuda(
                index, blobs[0], size, offset, blobs[1], counter_offset, blobs[2], sync
            )
        except RuntimeError as error:
            raise ValueError(f"cuda_ipc: the trainer's bucket cannot be mapped ({error}); is it alive?") from error
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]

    def _index(self, uuid: str) -> int:
        seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        if uuid not in seen:
            raise ValueError(
                f"cuda_ipc: the trainer's GPU {uuid} is not visible in the engine, which sees {', '.join(seen)}; add "
                "it to CUDA_VISIBLE_DEVICES, or use transport nccl"
            )
        return seen[uuid]

    def event(self) -> Any:
        return torch.cuda.Event(interprocess=True)

    def export_event(self, event: Any) -> str:
        return str(event.ipc_handle().hex())

    def open_event(self, handle: str, device: torch.device) -> Any:
        return torch.cuda.Event.from_ipc_handle(device, bytes.fromhex(handle))


class CudaBuckets(Buckets):
    """Two device buffers and an event each. Raises ValueError where the allocator's memory cannot be shared."""

    driver = CudaMemory()

    def __init__(self, options: BucketOptions) -> None:
        self.views = [self.driver.allocate(options.size) for _ in range(2)]
        self.events = [self.driver.event() for _ in self.views]
        self._description = {
            "memory": [self.driver.export(view) for view in self.views],
            "events": [self.driver.export_event(event) for event in self.events],
        }

    def describe(self) -> dict[str, Any]:
        return self._description

    def send(self, index: int, length: int) -> None:
        self.events[index].record()

    def close(self) -> None:
        self.views, self.events = [], []


class CudaReader(BucketReader):
    """Maps the trainer's memory. wait_for orders our stream after the record that came before the announcement."""

    driver = CudaMemory()

    def __init__(self, options: ReaderOptions) -> None:
        self.buffers = [self.driver.open(memory) for memory in options.description["memory"]]
        device = self.buffers[0].device
        self.events = [self.driver.open_event(event, device) for event in options.description["events"]]

    def wait_for(self, index: int, length: int) -> None:
        self.events[index].wait()

    def close(self) -> None:
        self.buffers, self.events = [], []


TRANSPORT = Transport(CudaBuckets, CudaReader, needs_cuda=True)
