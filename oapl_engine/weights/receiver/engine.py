"""The worker's side of a transfer: vLLM's four phases over a recorded plan. Loaded by vLLM only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from oapl_engine.weights.receiver.attach import attach
from oapl_engine.weights.receiver.checksum import checksum
from oapl_engine.weights.receiver.plan import DTYPES, Plan, PlanError, live_parameters, record
from oapl_engine.weights.receiver.probe import LayerProbe

INTEGER = {2: torch.int16, 4: torch.int32}  # copies and comparisons are of bits, not of values


@dataclass
class InitInfo(WeightTransferInitInfo):
    """manifest: (name, dtype, shape) a tensor; layout: (bucket, byte offset in it) a tensor, same order; buffers: what
    the transport describes; unused: tensors that the model may leave aside."""

    manifest: list[Any]
    layout: list[Any]
    buffers: dict[str, Any]
    unused: list[str] = field(default_factory=list)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Bucket number, and the checksum of each of its tensors in order."""

    bucket: int
    checksums: list[int]


@dataclass
class Source:
    """A trainer tensor in its bucket, with the live regions that it fills."""

    name: str
    tensor: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (live, in the bucket), integer views

    def read_back(self) -> torch.Tensor:
        """The tensor as the live parameters hold it; where another rank holds a part, that part as it was sent."""
        if (
            len(self.pairs) == 1
            and self.pairs[0][1].is_contiguous()
            and self.pairs[0][0].numel() == self.tensor.numel()
        ):
            return self.pairs[0][0]
        copy = self.tensor.clone()
        for live, sent in self.pairs:
            copy.as_strided(sent.shape, sent.stride(), sent.storage_offset() - self.tensor.storage_offset()).copy_(live)
        return copy


class InPlaceWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Writes each bucket into live storage after its checksums agree, and keeps account for report()."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buckets: dict[int, list[Source]] = {}
        self.plan = Plan({}, [])
        self.state = "complete"
        self.refused: dict[str, str] | None = None
        self._forget()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Record the plan and map the buckets. Raises PlanError."""
        self.refused = None
        try:
            self.plan = record(self.model, init_info.manifest, init_info.unused)
        except PlanError as error:
            self._refuse(error)
        parameters = dict(live_parameters(self.model).values())
        self.elements = sum(p.numel() for p in parameters.values())
        buffers = attach(init_info.buffers)
        self.buckets = {}
        for (name, dtype, shape), (bucket, offset) in zip(init_info.manifest, init_info.layout, strict=True):
            buffer = buffers[bucket % len(buffers)]
            sources = self.buckets.setdefault(bucket, [])
            sources.append(self._source(name, DTYPES[dtype], shape, buffer, offset, parameters))
        self.probe = LayerProbe(self.model)

    def _source(
        self, name: str, dtype: torch.dtype, shape: list[int], buffer: torch.Tensor, offset: int, live: dict[str, Any]
    ) -> Source:
        integer = INTEGER[dtype.itemsize]
        count = torch.Size(shape).numel()
        tensor = buffer[offset : offset + count * dtype.itemsize].view(integer)
        regions = self.plan.copies.get(name, [])
        base = tensor.storage_offset()
        pairs = [
            (to.of(live[to.name]).view(integer), tensor.as_strided(at.shape, at.stride, base + at.offset))
            for to, at in regions
        ]
        return Source(name, tensor, pairs)

    def start_weight_update(self) -> None:
        if not self.buckets:
            raise RuntimeError("start before init: no plan has been recorded")
        self.state, self.refused = "incomplete", None
        self._forget()
        parameters = dict(live_parameters(self.model).values())
        for region, value in self.plan.padding:
            region.of(parameters[region.name]).fill_(value)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base class without its device synchronisation, which CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Check every tensor of a bucket, then scatter them. Nothing of a bucket that differs reaches the model."""
        sources = self.buckets[update_info.bucket]
        for source, expected in zip(sources, update_info.checksums, strict=True):
            found = checksum(source.tensor)
            if found != expected:
                self._refuse(PlanError(source.name, f"checksum {expected:016x}", f"{found:016x} in the bucket"))
        for source in sources:
            for live, sent in source.pairs:
                storage = live.untyped_storage()._cdata
                self.changed[storage] = self.changed.get(storage, 0) + int(torch.count_nonzero(live != sent))
                live.copy_(sent)
            self.checksums[source.name] = checksum(source.read_back())

    def finish_weight_update(self) -> None:
        for source in (s for sources in self.buckets.values() for s in sources):
            if source.name not in self.checksums:
                self._refuse(PlanError(source.name, "to arrive in this update", "nothing"))
        stale = self.probe.stale(self.changed)
        if stale:
            self._refuse(PlanError(stale, "the layer to compute with its new values", "the answers of the old ones"))
        self.state = "complete"

    def report(self) -> dict[str, Any]:
        """state; refused: {parameter, expected, found} or None; checksums of live values by trainer tensor; changed and
        elements: counts over this rank's parameters in this update."""
        return {
            "state": self.state,
            "refused": self.refused,
            "checksums": dict(self.checksums),
            "changed": sum(self.changed.values()),
            "elements": self.elements,
        }

    def shutdown(self) -> None:
        self.buckets = {}

    def _forget(self) -> None:
        self.checksums: dict[str, int] = {}
        self.changed: dict[int, int] = {}
        self.elements = getattr(self, "elements", 0)

    def _refuse(self, error: PlanError) -> None:
        self.refused = {"parameter": error.parameter, "expected": error.expected, "found": error.found}
        raise error
