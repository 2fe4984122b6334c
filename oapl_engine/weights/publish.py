"""Publisher: one version of the trainer's weights into one live engine, complete and attested before it serves."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from oapl_kernels.weight_pack import combined, pack_all

from oapl_engine.weights.attest import (
    Gap,
    Golden,
    Logprobs,
    WeightMismatchError,
    check_checksums,
    check_golden,
    check_staleness,
)
from oapl_engine.weights.bucket_layout import Layout, NamedTensors, Piece, distinct, elements, lay_out
from oapl_engine.weights.transports import Buckets
from oapl_engine.weights.transports.memfd import MemfdBuckets

Control = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class PublishReport:
    """seconds: by phase (pause, init, pack, transfer, finish, attest, resume, total), pack and transfer overlap; the
    engine's own (take, check, scatter, read_back), of its slowest rank. bytes: sent; changed_share: of the engine's
    elements, bit patterns that differ from the version before; checksum: of all pieces, 16 hex digits; gap: log-probs
    of engine and trainer on the golden prompts, None without them."""

    version: int
    seconds: dict[str, float]
    bytes: int
    changed_share: float
    checksum: str
    gap: Gap | None


class Publisher:
    """Publishes to one engine through two buckets that are kept and used in turn.

    named_tensors(): (name, tensor) pairs as in a Hugging Face checkpoint, the same names, shapes and order every time,
    one alive at a time if it likes; tied tensors are sent once; a DTensor is gathered a bucket at a time, so the ranks
    of its mesh publish at once, each to its engine (or call layout.join_gathers).
    control(phase, payload): blocking; "pause" {"mode"}, "resume" {}, "score" {"token_ids"} → log-probs, and "init",
    "start", "bucket", "finish", "attest" → the reply of the engine's transfer (EngineClient.control does all of them).
    bucket_bytes: of one bucket at most; dtype: of the engine's parameters; make_buckets(size): a transport.
    """

    def __init__(
        self,
        named_tensors: NamedTensors,
        control: Control,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype = torch.bfloat16,
        golden: Golden | None = None,
        on_publish: str = "drain",
        make_buckets: Callable[[int], Buckets] = MemfdBuckets,
    ) -> None:
        self.named_tensors = named_tensors
        self.control = control
        self.bucket_bytes = bucket_bytes
        self.dtype = dtype
        self.golden = golden
        self.on_publish = on_publish
        self._make_buckets = make_buckets
        self._layout = Layout({}, [], 0)
        self._buckets: Buckets | None = None
        self._before: tuple[list[Logprobs], list[Logprobs]] | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def publish(self, version: int) -> PublishReport:
        """Pause, send, attest, resume. Raises WeightMismatchError (the engine then serves nothing until a
        complete later version is published) and what `control` raises."""
        clock = _Clock()
        with clock("total"):
            if self._buckets is None:
                self._layout = lay_out(self.named_tensors(), self.dtype, self.bucket_bytes)
            try:
                buckets = self._prepare(version, clock)
            except Exception:
                with contextlib.suppress(WeightMismatchError):
                    deque(self._gathered(), 0)  # the other ranks of a sharded trainer wait in these gathers
                raise
            try:
                with clock("transfer"):
                    expected = self._send(buckets, clock)
                with clock("finish"):
                    reports = self._phase("finish", {})["reports"]
            except BaseException:
                self._detach()  # a transport may be stuck in the middle, and the engine's plan may be what is wrong
                raise
            with clock("attest"):
                gap = self._attest(expected, reports)
            with clock("resume"):
                self.control("resume", {})
        for phase in reports[0]["seconds"]:
            clock.seconds[phase] = max(report["seconds"][phase] for report in reports)
        changed = sum(r["changed"] for r in reports) / sum(r["elements"] for r in reports)
        sent = sum(p.count for p in self._layout.pieces) * self.dtype.itemsize
        return PublishReport(version, clock.seconds, sent, changed, combined(expected.values()), gap)

    def engine_restarted(self) -> None:
        """The engine is a new process: record the plan and attach new buckets at the next publish."""
        self._detach()
        self._before = None

    def close(self) -> None:
        self._sender.shutdown()
        self._detach()

    def _prepare(self, version: int, clock: _Clock) -> Buckets:
        """An engine that is paused, attached, and waits for the first bucket of a version."""
        with clock("pause"):
            self.control("pause", {"mode": self.on_publish})
        with clock("init"):
            buckets = self._buckets or self._attach()
        self._phase("start", {"version": version})
        return buckets

    def _phase(self, phase: str, payload: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = self.control(phase, payload)
        for report in [reply, *reply["reports"]] if reply["error"] else ():
            if report.get("refused"):
                raise WeightMismatchError(**report["refused"])
        if reply["error"]:
            raise RuntimeError(f"weight transfer, phase {phase}: {reply['error']}")
        return reply

    def _attach(self) -> Buckets:
        buckets = self._make_buckets(self._layout.size)
        dtype = str(self.dtype).removeprefix("torch.")
        manifest = [(name, dtype, list(shape)) for name, shape in self._layout.shapes.items()]
        layout = [(p.label, p.name, p.start, p.count, p.bucket, p.offset) for p in self._layout.pieces]
        try:
            self._phase("init", {"manifest": manifest, "layout": layout, "buffers": buckets.describe()})
        except BaseException:
            buckets.close()
            raise
        self._buckets = buckets
        return buckets

    def _detach(self) -> None:
        if self._buckets is not None:
            self._buckets.close()
        self._buckets = None

    def _send(self, buckets: Buckets, clock: _Clock) -> dict[str, int]:
        """Pack a bucket while the engine takes the one before. Returns checksums by label.

        After a failure the gathers go on, without sending: other ranks of a sharded trainer wait in them.
        """
        expected: dict[str, int] = {}
        under_way: deque[Future[Any]] = deque()
        failure: Exception | None = None
        try:
            for pieces in self._gathered():
                try:
                    if failure is None:
                        self._send_bucket(buckets, pieces, expected, under_way, clock)
                except Exception as error:
                    failure = error
        finally:
            wait(under_way)  # after a failure too: no bucket of this version may reach the engine later
        if failure is not None:
            raise failure
        for future in under_way:
            future.result()
        return expected

    def _send_bucket(
        self,
        buckets: Buckets,
        pieces: list[tuple[Piece, torch.Tensor]],
        expected: dict[str, int],
        under_way: deque[Future[Any]],
        clock: _Clock,
    ) -> None:
        if len(under_way) == 2:
            under_way.popleft().result()
        number = pieces[0][0].bucket
        index = number % len(buckets.views)
        buckets.wait(index)
        with clock("pack"):
            sums = self._pack(buckets.views[index], pieces)
        last = pieces[-1][0]
        length = last.offset + last.count * self.dtype.itemsize
        buckets.send(index, length)
        expected.update(sums)
        payload = {"bucket": number, "length": length, "checksums": sums}
        under_way.append(self._sender.submit(self._phase, "bucket", payload))

    def _gathered(self) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
        """Pieces with their elements, bucket by bucket. WeightMismatchError if a tensor is missing, new or reshaped."""
        offered = distinct(self.named_tensors())
        name, tensor = "", torch.empty(0)
        for pieces in self._layout.buckets():
            bucket = []
            for piece in pieces:
                if piece.name != name:
                    name, tensor = self._next(offered, piece.name)
                bucket.append((piece, elements(tensor, piece.start, piece.count)))
            yield bucket
        for name, tensor in offered:
            raise WeightMismatchError(name, "no tensor of this name", f"one of shape {list(tensor.shape)}")

    def _next(self, offered: Iterator[tuple[str, torch.Tensor]], expected: str) -> tuple[str, torch.Tensor]:
        shape = list(self._layout.shapes[expected])
        name, tensor = next(offered, ("nothing", torch.empty(0)))
        if name != expected:
            raise WeightMismatchError(expected, f"a tensor of shape {shape}", f"{name} in its place")
        if list(tensor.shape) != shape:
            raise WeightMismatchError(name, f"shape {shape}", f"shape {list(tensor.shape)}")
        return name, tensor

    def _pack(self, view: torch.Tensor, pieces: list[tuple[Piece, torch.Tensor]]) -> dict[str, int]:
        """Cast (round to nearest even) into the bucket. Returns checksums by label. Refuses what is not finite."""
        places = [view[p.offset : p.offset + p.count * self.dtype.itemsize].view(self.dtype) for p, _ in pieces]
        digests = pack_all([source.to(view.device) for _, source in pieces], places)
        values = digests.cpu().to(torch.int64) & 0xFFFFFFFF  # waits for the device
        sums = {}
        for (piece, _), (low, high, infinite) in zip(pieces, values.tolist(), strict=True):
            if infinite:
                raise WeightMismatchError(piece.name, f"finite values of {self.dtype}", f"{infinite} that are not")
            sums[piece.label] = low | high << 32
        return sums

    def _attest(self, expected: dict[str, int], reports: list[dict[str, Any]]) -> Gap | None:
        gap = None
        try:
            check_checksums(expected, reports)
            if self.golden:
                scores = self._sender.submit(self._score, self.golden.prompts)
                with _half_of_the_cores():
                    trainer = self.golden.trainer_logprobs(self.golden.prompts)
                engine = scores.result()
                if any(report["changed"] for report in reports):  # small steps of float32 may round away in bfloat16
                    check_staleness(self.golden.tolerance, engine, trainer, self._before)
                gap = check_golden(self.golden.tolerance, engine, trainer)
                self._before = engine, trainer
        except WeightMismatchError:
            self._phase("attest", {"accepted": False})
            raise
        self._phase("attest", {"accepted": True})
        return gap

    def _score(self, prompts: Sequence[Sequence[int]]) -> list[Logprobs]:
        """One after another: what is batched together may round differently from publish to publish."""
        return [self.control("score", {"token_ids": list(p)}) for p in prompts]


@contextlib.contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """The engine scores meanwhile, and two full teams of threads on the same cores wait for each other at barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(-(-threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
