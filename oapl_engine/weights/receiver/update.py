"""The receiving side of a transfer, without vLLM: checks buckets, writes them into a model in place, keeps account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oapl_engine.weights.receiver.attach import attach
from oapl_engine.weights.receiver.checksum import checksum
from oapl_engine.weights.receiver.plan import DTYPES, Plan, PlanError, live_parameters, record

INTEGER = {2: torch.int16, 4: torch.int32}  # copies and comparisons are of bits, not of values


@dataclass
class Source:
    """A trainer tensor in its bucket, with the live regions that it fills."""

    name: str
    tensor: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (live, in the bucket), integer views

    def read_back(self) -> torch.Tensor:
        """The tensor as the live parameters hold it; where another rank holds a part, that part as it was sent."""
        live, sent = self.pairs[0] if len(self.pairs) == 1 else (self.tensor, self.tensor[:0])
        if sent.is_contiguous() and sent.numel() == self.tensor.numel():
            return live
        copy = self.tensor.clone()
        for live, sent in self.pairs:
            copy.as_strided(sent.shape, sent.stride(), sent.storage_offset() - self.tensor.storage_offset()).copy_(live)
        return copy


class InPlaceUpdate:
    """One model that is updated bucket by bucket. stale(): see LayerProbe.stale.

    A refusal raises PlanError and is kept for report(); the state is then "incomplete" until a whole update arrived.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.state = "complete"
        self.refused: dict[str, str] | None = None
        self.stale: Callable[[], str | None] = lambda: None
        self.plan = Plan({}, [])
        self.buckets: dict[int, list[Source]] = {}
        self.checksums: dict[str, int] = {}
        self.changed = 0
        self.elements = 0

    def init(self, manifest: list[Any], layout: list[Any], buffers: dict[str, Any], unused: list[str]) -> None:
        """Record the plan and map the buckets. Raises PlanError."""
        self.refused = None
        try:
            self.plan = record(self.model, manifest, unused)
        except PlanError as error:
            self._refuse(error)
        parameters = dict(live_parameters(self.model).values())
        self.elements = sum(p.numel() for p in parameters.values())
        mapped = attach(buffers)
        self.buckets = {}
        for (name, dtype, shape), (bucket, offset) in zip(manifest, layout, strict=True):
            buffer = mapped[bucket % len(mapped)]
            sources = self.buckets.setdefault(bucket, [])
            sources.append(self._source(name, DTYPES[dtype], shape, buffer, offset, parameters))

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

    def start(self) -> None:
        if not self.buckets:
            raise RuntimeError("start before init: no plan has been recorded")
        self.state, self.refused = "incomplete", None
        self.checksums, self.changed = {}, 0
        parameters = dict(live_parameters(self.model).values())
        for region, value in self.plan.padding:
            region.of(parameters[region.name]).fill_(value)

    def receive(self, bucket: int, checksums: dict[str, int]) -> None:
        """Check the tensors of a bucket (checksums by name), then scatter them: all of them, or none if one differs."""
        sources = [s for s in self.buckets[bucket] if s.name in checksums]
        for source in sources:
            expected, found = checksums[source.name], checksum(source.tensor)
            if found != expected:
                self._refuse(PlanError(source.name, f"checksum {expected:016x}", f"{found:016x} in the bucket"))
        for source in sources:
            for live, sent in source.pairs:
                arrived = sent.to(live.device)
                self.changed += int(torch.count_nonzero(live != arrived))
                live.copy_(arrived)
            self.checksums[source.name] = checksum(source.read_back())

    def finish(self) -> None:
        for source in (s for sources in self.buckets.values() for s in sources):
            if source.name not in self.checksums:
                self._refuse(PlanError(source.name, "to arrive in this update", "nothing"))
        stale = self.stale()
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
            "changed": self.changed,
            "elements": self.elements,
        }

    def _refuse(self, error: PlanError) -> None:
        self.refused = {"parameter": error.parameter, "expected": error.expected, "found": error.found}
        raise error
