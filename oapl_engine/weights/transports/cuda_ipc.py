"""Buckets in this process's GPU memory, mapped by an engine on the same node that sees the same GPU.

A wait on a shared event orders a stream only after a record that was already issued: send() records, and the
announcement that follows it is what makes the engine's wait mean anything. No event is needed for the way back: the
engine answers after the checksum of what it wrote has come to its host.
"""

from __future__ import annotations

from typing import Any

from oapl_engine.weights.receiver.cuda_memory import CudaMemory
from oapl_engine.weights.transports import Buckets


class CudaBuckets(Buckets):
    """Two device buffers and an event each. Raises ValueError where the allocator's memory cannot be shared."""

    driver = CudaMemory()

    def __init__(self, size: int) -> None:
        self.size = size
        self.views = [self.driver.allocate(size) for _ in range(2)]
        self.events = [self.driver.event() for _ in self.views]
        memory = [self.driver.export(view) for view in self.views]
        events = [self.driver.export_event(event) for event in self.events]
        self._description = {"transport": "cuda_ipc", "memory": memory, "events": events, "size": size}

    def describe(self) -> dict[str, Any]:
        return self._description

    def send(self, index: int, length: int) -> None:
        self.events[index].record()

    def close(self) -> None:
        self.views, self.events = [], []
