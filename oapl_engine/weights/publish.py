"""Publisher: one version of the trainer's weights into one live engine, complete and attested before it serves."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from oapl_engine.weights.attest import (
    Gap,
    Golden,
    Logprobs,
    WeightMismatch,
    check_checksums,
    check_golden,
    check_staleness,
)
from oapl_engine.weights.receiver.checksum import checksum, combine
from oapl_engine.weights.transports.memfd import MemfdBuckets

ALIGNMENT = 64  # bytes
NamedTensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
Control = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class PublishReport:
    """seconds: by phase (pause, pack, transfer, finish, attest, resume, total); pack and transfer overlap. bytes: sent;
    changed_share: of the engine's elements, bit patterns that differ from the version before; checksum: of all tensors,
    16 hex digits; gap: log-probs of engine and trainer on the golden prompts, None without golden prompts."""

    version: int
    seconds: dict[str, float]
    bytes: int
    changed_share: float
    checksum: str
    gap: Gap | None


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: bucket number, byte offset in it."""

    name: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


class Publisher:
    """Publishes to one engine through two buckets that are kept and used in turn.

    named_tensors(): (name, tensor) pairs as in a Hugging Face checkpoint, the same names, shapes and order every time,
    each complete (a sharded trainer gathers while it is iterated); tied tensors are sent once.
    control(phase, payload): blocking; "pause" {"mode"}, "resume" {}, "score" {"token_ids"} → log-probs, and "init",
    "start", "bucket", "finish", "attest" → the reply of the engine's transfer (EngineClient.control does all of them).
    bucket_bytes: of one bucket, raised to the largest tensor; dtype: of the engine's parameters.
    """

    def __init__(
        self,
        named_tensors: NamedTensors,
        control: Control,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype = torch.bfloat16,
        golden: Golden | None = None,
        on_publish: str = "drain",
    ) -> None:
        self.named_tensors = named_tensors
        self.control = control
        self.bucket_bytes = bucket_bytes
        self.dtype = dtype
        self.golden = golden
        self.on_publish = on_publish
        self._slots: list[Slot] = []
        self._buckets: MemfdBuckets | None = None
        self._attached = False
        self._before: tuple[list[Logprobs], list[Logprobs]] | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def publish(self, version: int) -> PublishReport:
        """Pause, send, attest, resume. Raises WeightMismatch (the engine then serves nothing until a later version is
        published whole) and what `control` raises."""
        clock = _Clock()
        with clock("total"):
            with clock("pause"):
                self.control("pause", {"mode": self.on_publish})
            self._attach()
            self._phase("start", {"version": version})
            with clock("transfer"):
                expected, sent = self._send(clock)
            with clock("finish"):
                reports = self._phase("finish", {})["reports"]
            with clock("attest"):
                gap = self._attest(expected, reports)
            with clock("resume"):
                self.control("resume", {})
        changed = sum(r["changed"] for r in reports) / sum(r["elements"] for r in reports)
        digest = combine([(value & 0xFFFFFFFF, value >> 32) for value in expected.values()])
        return PublishReport(version, clock.seconds, sent, changed, f"{digest:016x}", gap)

    def engine_restarted(self) -> None:
        """The engine is a new process: record the plan and attach the buckets again at the next publish."""
        self._attached = False
        self._before = None

    def close(self) -> None:
        self._sender.shutdown()
        if self._buckets:
            self._buckets.close()

    def _phase(self, phase: str, payload: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = self.control(phase, payload)
        for report in reply["reports"] if reply["error"] else ():
            if report["refused"]:
                raise WeightMismatch(**report["refused"])
        if reply["error"]:
            raise RuntimeError(f"weight transfer, phase {phase}: {reply['error']}")
        return reply

    def _attach(self) -> None:
        if self._attached:
            return
        if self._buckets is None:
            self._slots, size = lay_out(self._distinct(), self.dtype, self.bucket_bytes)
            self._buckets = MemfdBuckets(size)
        dtype = str(self.dtype).removeprefix("torch.")
        manifest = [(s.name, dtype, list(s.shape)) for s in self._slots]
        layout = [(s.bucket, s.offset) for s in self._slots]
        self._phase("init", {"manifest": manifest, "layout": layout, "buffers": self._buckets.describe()})
        self._attached = True

    def _distinct(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors without the second names of tied ones."""
        seen = set()
        for name, tensor in self.named_tensors():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in seen:
                seen.add(key)
                yield name, tensor

    def _send(self, clock: _Clock) -> tuple[dict[str, int], int]:
        """Pack a bucket while the engine takes the one before. Returns checksums by name, and bytes."""
        expected: dict[str, int] = {}
        under_way: deque[Future[Any]] = deque()
        sent = 0
        try:
            for slots, tensors in self._by_bucket():
                if len(under_way) == 2:
                    under_way.popleft().result()
                with clock("pack"):
                    sums = {s.name: self._pack(s, tensor) for s, tensor in zip(slots, tensors, strict=True)}
                expected.update(sums)
                payload = {"bucket": slots[0].bucket, "checksums": sums}
                under_way.append(self._sender.submit(self._phase, "bucket", payload))
                sent += sum(t.numel() for t in tensors) * self.dtype.itemsize
            for future in under_way:
                future.result()
        finally:
            wait(under_way)  # after a failure too: no bucket of this version may reach the engine later
        return expected, sent

    def _by_bucket(self) -> Iterator[tuple[list[Slot], list[torch.Tensor]]]:
        """The trainer's tensors, bucket by bucket. Raises WeightMismatch if one is missing, new or reshaped."""
        slots: list[Slot] = []
        tensors: list[torch.Tensor] = []
        offered = iter(self._distinct())
        for slot in self._slots:
            name, tensor = next(offered, ("nothing", torch.empty(0)))
            if name != slot.name:
                raise WeightMismatch(slot.name, f"a tensor of shape {list(slot.shape)}", f"{name} in its place")
            if tuple(tensor.shape) != slot.shape:
                raise WeightMismatch(name, f"shape {list(slot.shape)}", f"shape {list(tensor.shape)}")
            if slots and slot.bucket != slots[0].bucket:
                yield slots, tensors
                slots, tensors = [], []
            slots.append(slot)
            tensors.append(tensor)
        yield slots, tensors
        for name, tensor in offered:
            raise WeightMismatch(name, "no tensor of this name", f"one of shape {list(tensor.shape)}")

    def _pack(self, slot: Slot, tensor: torch.Tensor) -> int:
        """Cast (round to nearest even) into the bucket. Returns the checksum. Refuses what is not finite."""
        assert self._buckets is not None
        largest = float(torch.linalg.vector_norm(tensor.detach(), float("inf")))
        if not largest <= torch.finfo(self.dtype).max:
            raise WeightMismatch(slot.name, f"finite values of {self.dtype}", f"a largest magnitude of {largest}")
        view = self._buckets.views[slot.bucket % len(self._buckets.views)]
        place = view[slot.offset : slot.offset + tensor.numel() * self.dtype.itemsize].view(self.dtype)
        place.copy_(tensor.detach().reshape(-1))
        return checksum(place)

    def _attest(self, expected: dict[str, int], reports: list[dict[str, Any]]) -> Gap | None:
        gap = None
        try:
            check_checksums(expected, reports)
            if self.golden:
                engine = [self.control("score", {"token_ids": list(p)}) for p in self.golden.prompts]
                trainer = self.golden.trainer_logprobs(self.golden.prompts)
                check_staleness(self.golden.tolerance, engine, trainer, self._before)
                gap = check_golden(self.golden.tolerance, engine, trainer)
                self._before = engine, trainer
        except WeightMismatch:
            self._phase("attest", {"accepted": False})
            raise
        self._phase("attest", {"accepted": True})
        return gap


def lay_out(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> tuple[list[Slot], int]:
    """Tensors into buckets in order, and the size of a bucket: bucket_bytes, or the largest tensor."""
    slots: list[Slot] = []
    bucket, offset, size = 0, 0, bucket_bytes
    for name, tensor in tensors:
        length = tensor.numel() * dtype.itemsize
        if offset and offset + length > bucket_bytes:
            bucket, offset = bucket + 1, 0
        slots.append(Slot(name, tuple(tensor.shape), bucket, offset))
        size = max(size, offset + length)
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return slots, size


class _Clock:
    """Seconds by name; the same name adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
