"""The receiving side of a transfer, without vLLM: checks buckets, writes them into a model in place, keeps account."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from oapl_kernels.weight_pack import copy_and_count_changes

from oapl_engine.weights.control import BucketSlice, TensorEntry
from oapl_engine.weights.receiver.checksum import checksums as checksums_of
from oapl_engine.weights.receiver.plan import DTYPES, Plan, PlanError, live_parameters, record, restrict
from oapl_engine.weights.transports import BucketReader, open_reader

INTEGER = {2: torch.int16, 4: torch.int32}  # copies and comparisons are of bits, not of values
PHASES = ("take", "check", "scatter", "read_back")


@dataclass
class SentSlice:
    """A slice of a trainer tensor in its bucket, and where it goes.

    label, name:  of the BucketSlice
    sent:         the bytes in the bucket, as integers
    copies:       (live, in the bucket) integer views
    """

    label: str
    name: str
    sent: torch.Tensor
    copies: list[tuple[torch.Tensor, torch.Tensor]]

    def live_view(self) -> torch.Tensor | None:
        """The live elements, where they are the slice exactly as it was sent; None where they are parts of it."""
        if len(self.copies) != 1:
            return None
        live, sent = self.copies[0]
        return live if sent.is_contiguous() and sent.numel() == self.sent.numel() else None

    def read_back(self) -> torch.Tensor:
        """The slice as the live parameters hold it; where another rank holds a part, that part as it was sent."""
        live = self.live_view()
        if live is not None:
            return live
        copy = self.sent.clone()
        for live, sent in self.copies:
            offset = sent.storage_offset() - self.sent.storage_offset()
            copy.as_strided(sent.shape, sent.stride(), offset).copy_(live)
        return copy


class InPlaceUpdate:
    """One model that is updated bucket by bucket, in rank `rank` of its engine.

    state:    of the weights: complete, or incomplete from start() until a complete update has arrived
    stale:    names a layer that does not compute with its weight (LayerCheck.stale)
    refused:  {parameter, expected, found} of the last refusal, which also raised PlanError

    The account of an update: checksums of live values by label; changed and elements, counts over this rank's
    parameters; seconds by phase.
    """

    def __init__(self, model: torch.nn.Module, rank: int = 0) -> None:
        self.model, self.rank = model, rank
        self.state = "complete"
        self.refused: dict[str, str] | None = None
        self.stale: Callable[[], str | None] = lambda: None
        self.plan = Plan({}, [])
        self.reader: BucketReader | None = None
        self.buckets: dict[int, list[SentSlice]] = {}
        self.checksums: dict[str, int] = {}
        self.changed = 0
        self.elements = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def init(self, manifest: list[Any], layout: list[Any], buffers: dict[str, Any]) -> None:
        """Record the plan and attach the transport. Arguments: fields of control.Init, as plain lists. PlanError."""
        entries = [TensorEntry(*entry) for entry in manifest]
        self.close()
        self.refused = None
        try:
            self.plan = record(self.model, entries)
        except PlanError as error:
            self._refuse(error)
        live = dict(live_parameters(self.model).values())
        self.elements = sum(p.numel() for p in live.values())
        self.reader = open_reader(buffers, self.rank, next(iter(live.values())).device)
        sizes = {entry.name: DTYPES[entry.dtype].itemsize for entry in entries}
        for part in (BucketSlice(*fields) for fields in layout):
            size = sizes[part.name]
            buffer = self.reader.buffers[part.bucket % len(self.reader.buffers)]
            sent = buffer[part.offset : part.offset + part.length * size].view(INTEGER[size])
            copies = self._copies(part, sent, live)
            self.buckets.setdefault(part.bucket, []).append(SentSlice(part.label, part.name, sent, copies))

    def _copies(self, part: BucketSlice, sent: torch.Tensor, live: dict[str, Any]) -> list[Any]:
        """(live, in the bucket) views of what the plan copies from this slice."""
        base = sent.storage_offset() - part.start
        return [
            (into.view(live[into.name]).view(sent.dtype), sent.as_strided(at.shape, at.stride, base + at.offset))
            for target, origin in self.plan.copies.get(part.name, [])
            for into, at in restrict(target, origin, part.start, part.start + part.length)
        ]

    def start(self) -> None:
        if not self.buckets:
            raise RuntimeError("start before init: no plan has been recorded")
        self.state, self.refused = "incomplete", None
        self.checksums, self.changed = {}, 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        parameters = dict(live_parameters(self.model).values())
        for region, value in self.plan.padding:
            region.view(parameters[region.name]).fill_(value)

    def receive(self, bucket: int, length: int, checksums: dict[str, int]) -> None:
        """Check the slices of a bucket (checksums by label), then scatter them: all of them, or none if one differs."""
        if self.reader is None:
            raise RuntimeError("bucket before init: no transport is attached")
        slices = [part for part in self.buckets[bucket] if part.label in checksums]
        with self._timed("take"):
            self.reader.wait_for(bucket % len(self.reader.buffers), length)
        with self._timed("check"):
            for part, found in zip(slices, checksums_of(part.sent for part in slices), strict=True):
                expected = checksums[part.label]
                if found != expected:
                    self._refuse(PlanError(part.name, f"checksum {expected:016x}", f"{found:016x} in the bucket"))
        with self._timed("scatter"):
            self._scatter([copy for part in slices for copy in part.copies])
        with self._timed("read_back"):
            in_place = [part for part in slices if part.live_view() is not None]
            copied = [part for part in slices if part.live_view() is None]  # one at a time in memory
            for batch in (in_place, *([part] for part in copied)):
                found_live = checksums_of(part.read_back() for part in batch)
                self.checksums |= zip((part.label for part in batch), found_live, strict=True)

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
        for part in (part for slices in self.buckets.values() for part in slices):
            if part.label not in self.checksums:
                self._refuse(PlanError(part.name, "to arrive in this update", "nothing"))
        stale = self.stale()
        if stale:
            self._refuse(PlanError(stale, "the layer to compute with its new values", "the answers of the old ones"))
        self.state = "complete"

    def report(self) -> dict[str, Any]:
        """State, refusal and account of this update, as plain JSON."""
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
        if self.reader is not None:
            self.reader.close()
        self.reader = None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin

    def _refuse(self, error: PlanError) -> None:
        self.refused = {"parameter": error.parameter, "expected": error.expected, "found": error.found}
        raise error
