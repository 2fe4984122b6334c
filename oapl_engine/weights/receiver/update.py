"""The receiving side of a transfer, without vLLM: checks buckets, writes them into a model in place, keeps account."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from oapl_kernels.weight_pack import copy_and_count_changes

from oapl_engine.weights.receiver.checksum import checksums as checksums_of
from oapl_engine.weights.receiver.inbox import Inbox, open_inbox
from oapl_engine.weights.receiver.plan import DTYPES, Plan, PlanError, cut, live_parameters, record

INTEGER = {2: torch.int16, 4: torch.int32}  # copies and comparisons are of bits, not of values
PHASES = ("take", "check", "scatter", "read_back")


@dataclass
class Source:
    """A piece of a trainer tensor in its bucket, with the live regions that it fills."""

    label: str
    name: str
    tensor: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (live, in the bucket), integer views

    def in_place(self) -> torch.Tensor | None:
        """The live region, where it is the piece as it was sent; None where it is parts of it."""
        live, sent = self.pairs[0] if len(self.pairs) == 1 else (self.tensor, self.tensor[:0])
        return live if sent.is_contiguous() and sent.numel() == self.tensor.numel() else None

    def read_back(self) -> torch.Tensor:
        """The piece as the live parameters hold it; where another rank holds a part, that part as it was sent."""
        if (live := self.in_place()) is not None:
            return live
        copy = self.tensor.clone()
        for live, sent in self.pairs:
            copy.as_strided(sent.shape, sent.stride(), sent.storage_offset() - self.tensor.storage_offset()).copy_(live)
        return copy


class InPlaceUpdate:
    """One model that is updated bucket by bucket, in rank `rank` of its engine. stale(): see LayerProbe.stale.

    A refusal raises PlanError and is kept for report(); the state is then "incomplete" until a whole update arrived.
    """

    def __init__(self, model: torch.nn.Module, rank: int = 0) -> None:
        self.model, self.rank = model, rank
        self.state = "complete"
        self.refused: dict[str, str] | None = None
        self.stale: Callable[[], str | None] = lambda: None
        self.plan = Plan({}, [])
        self.inbox: Inbox | None = None
        self.buckets: dict[int, list[Source]] = {}
        self.checksums: dict[str, int] = {}
        self.changed = 0
        self.elements = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def init(self, manifest: list[Any], layout: list[Any], buffers: dict[str, Any], unused: list[str]) -> None:
        """Record the plan and map the buckets. Raises PlanError."""
        self.close()
        self.refused = None
        try:
            self.plan = record(self.model, manifest, unused)
        except PlanError as error:
            self._refuse(error)
        live = dict(live_parameters(self.model).values())
        self.elements = sum(p.numel() for p in live.values())
        self.inbox = open_inbox(buffers, self.rank, next(iter(live.values())).device)
        dtypes = {name: DTYPES[dtype] for name, dtype, _ in manifest}
        for label, name, start, count, bucket, offset in layout:
            size = dtypes[name].itemsize
            buffer = self.inbox.buffers[bucket % len(self.inbox.buffers)]
            tensor = buffer[offset : offset + count * size].view(INTEGER[size])
            source = Source(label, name, tensor, self._pairs(name, tensor, start, live))
            self.buckets.setdefault(bucket, []).append(source)

    def _pairs(self, name: str, tensor: torch.Tensor, start: int, live: dict[str, Any]) -> list[Any]:
        base = tensor.storage_offset() - start
        return [
            (part.of(live[part.name]).view(tensor.dtype), tensor.as_strided(at.shape, at.stride, base + at.offset))
            for whole, origin in self.plan.copies.get(name, [])
            for part, at in cut(whole, origin, start, start + len(tensor))
        ]

    def start(self) -> None:
        if not self.buckets:
            raise RuntimeError("start before init: no plan has been recorded")
        self.state, self.refused = "incomplete", None
        self.checksums, self.changed = {}, 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        parameters = dict(live_parameters(self.model).values())
        for region, value in self.plan.padding:
            region.of(parameters[region.name]).fill_(value)

    def receive(self, bucket: int, length: int, checksums: dict[str, int]) -> None:
        """Check the pieces of a bucket (checksums by label), then scatter them: all of them, or none if one differs."""
        assert self.inbox is not None
        sources = [s for s in self.buckets[bucket] if s.label in checksums]
        with self._timed("take"):
            self.inbox.take(bucket % len(self.inbox.buffers), length)
        with self._timed("check"):
            for source, found in zip(sources, checksums_of(s.tensor for s in sources), strict=True):
                if found != (expected := checksums[source.label]):
                    self._refuse(PlanError(source.name, f"checksum {expected:016x}", f"{found:016x} in the bucket"))
        with self._timed("scatter"):
            self._scatter([pair for source in sources for pair in source.pairs])
        with self._timed("read_back"):
            together = [s for s in sources if s.in_place() is not None]
            apart = [s for s in sources if s.in_place() is None]  # copies: one at a time in memory
            for batch in (together, *([s] for s in apart)):
                found_live = checksums_of(s.read_back() for s in batch)
                self.checksums |= zip((s.label for s in batch), found_live, strict=True)

    def _scatter(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        for live, sent in pairs:
            if not live.is_cuda and live.is_contiguous() and sent.is_contiguous():
                flat.append((sent.view(-1), live.view(-1)))
                continue
            arrived = sent.to(live.device)
            self.changed += int(torch.count_nonzero(live != arrived))
            live.copy_(arrived)
        self.changed += copy_and_count_changes([sent for sent, _ in flat], [live for _, live in flat])

    def finish(self) -> None:
        for source in (s for sources in self.buckets.values() for s in sources):
            if source.label not in self.checksums:
                self._refuse(PlanError(source.name, "to arrive in this update", "nothing"))
        stale = self.stale()
        if stale:
            self._refuse(PlanError(stale, "the layer to compute with its new values", "the answers of the old ones"))
        self.state = "complete"

    def report(self) -> dict[str, Any]:
        """state; refused: {parameter, expected, found} or None; checksums of live values by label; changed, elements:
        counts over this rank's parameters; seconds by phase: all of this update."""
        return {
            "state": self.state,
            "refused": self.refused,
            "checksums": dict(self.checksums),
            "changed": self.changed,
            "elements": self.elements,
            "seconds": dict(self.seconds),
        }

    def parameter_checksums(self) -> dict[str, int]:
        """Of the live parameters by the engine's own names, tied ones once."""
        named = dict(live_parameters(self.model).values())
        return dict(zip(named, checksums_of(named.values()), strict=True))

    def close(self) -> None:
        """Let go of the trainer's buckets."""
        self.buckets = {}
        if self.inbox is not None:
            self.inbox.close()
        self.inbox = None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin

    def _refuse(self, error: PlanError) -> None:
        self.refused = {"parameter": error.parameter, "expected": error.expected, "found": error.found}
        raise error
