"""Publisher: one version of the trainer's weights into one live engine, complete and attested before it serves."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from oapl_kernels.weight_pack import combine_checksums, pack_all

from oapl_engine.weights.attest import (
    LogprobGap,
    Logprobs,
    ProbePrompts,
    WeightMismatchError,
    check_checksums,
    check_probes,
    check_staleness,
)
from oapl_engine.weights.bucket_layout import BucketLayout, NamedTensors, flat_slice, join_gathers, lay_out, skip_tied
from oapl_engine.weights.control import (
    Attest,
    Bucket,
    BucketSlice,
    EngineControl,
    Finish,
    Init,
    Start,
    TensorEntry,
    UpdateReply,
    UpdateRequest,
)
from oapl_engine.weights.transports import Buckets, make_buckets

FilledSlice = tuple[BucketSlice, torch.Tensor]  # and its elements, flat


@dataclass(frozen=True)
class PublishReport:
    """What a publish did.

    seconds:        by phase: init, pack, transfer, finish, attest, total (pack and transfer overlap), and the engine's
                    own, of its slowest rank: take, check, scatter, read_back
    bytes:          sent
    changed_share:  of the engine's elements, bit patterns that differ from the version before
    checksum:       of all slices, 16 hex digits
    gap:            log-probs of engine and trainer on the probe prompts; None without them
    """

    version: int
    seconds: dict[str, float]
    bytes: int
    changed_share: float
    checksum: str
    gap: LogprobGap | None


class Publisher:
    """Publishes to one paused engine through two buckets that are kept and used in turn.

    named_tensors:  () -> (name, tensor) pairs as in a Hugging Face checkpoint, the same names, shapes and order every
                    time; one may be alive at a time; tied tensors are sent once. A DTensor is gathered a bucket at a
                    time, so the ranks of its mesh publish at the same time, each to its engine (or call
                    bucket_layout.join_gathers)
    control:        of the engine
    bucket_bytes:   of one bucket at most
    dtype:          of the engine's parameters
    probes:         prompts that attest that the engine computes with the new weights
    make_buckets:   (bytes of a bucket) -> the transport's Buckets

    Example, for a trainer of your own (docs/weights.md):

        publisher = Publisher(model.named_parameters, StockServer("http://127.0.0.1:8000"))
        report = publish_paused(publisher, version=1)
    """

    def __init__(
        self,
        named_tensors: NamedTensors,
        control: EngineControl,
        *,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype = torch.bfloat16,
        probes: ProbePrompts | None = None,
        make_buckets: Callable[[int], Buckets] = lambda size: make_buckets("memfd", size),
    ) -> None:
        self.named_tensors = named_tensors
        self.control = control
        self.bucket_bytes = bucket_bytes
        self.dtype = dtype
        self.probes = probes
        self.layout = BucketLayout({}, [], 0)
        self.buckets: Buckets | None = None
        self._make_buckets = make_buckets
        self._before: tuple[list[Logprobs], list[Logprobs]] | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def publish(self, version: int) -> PublishReport:
        """Send and attest. The engine must be paused; it may be resumed when this returns.

        Raises WeightMismatchError (the engine then serves nothing until a complete later version is published) and what
        `control` raises.
        """
        clock = _Clock()
        with clock("total"):
            if self.buckets is None:
                self.layout = lay_out(self.named_tensors(), self.dtype, self.bucket_bytes)
            buckets = self._prepare(version, clock)
            try:
                with clock("transfer"):
                    expected = self._send(buckets, clock)
                with clock("finish"):
                    reports = self._update(Finish()).reports
            except BaseException:
                self._detach()  # a transport may be stuck in the middle, and the engine's plan may be what is wrong
                raise
            with clock("attest"):
                gap = self._attest(expected, reports)
        for phase in reports[0]["seconds"]:
            clock.seconds[phase] = max(report["seconds"][phase] for report in reports)
        return PublishReport(
            version=version,
            seconds=clock.seconds,
            bytes=sum(part.length for part in self.layout.slices) * self.dtype.itemsize,
            changed_share=sum(r["changed"] for r in reports) / sum(r["elements"] for r in reports),
            checksum=combine_checksums(expected.values()),
            gap=gap,
        )

    def engine_restarted(self) -> None:
        """The engine is a new process: record the plan and attach new buckets at the next publish."""
        self._detach()
        self._before = None

    def close(self) -> None:
        self._sender.shutdown()
        self._detach()

    def _prepare(self, version: int, clock: "_Clock") -> Buckets:
        """An engine that is attached and waits for the first bucket of a version."""
        try:
            with clock("init"):
                buckets = self.buckets or self._attach()
            self._update(Start(version))
        except Exception:
            self.join_gathers()
            raise
        return buckets

    def join_gathers(self) -> None:
        """Instead of a publish that cannot begin: the other ranks of a sharded trainer wait in these gathers."""
        join_gathers(self.named_tensors, self.dtype, self.bucket_bytes)

    def _update(self, request: UpdateRequest) -> UpdateReply:
        reply = self.control.update(request)
        if reply.error:
            for refused in (reply.refused, *(report.get("refused") for report in reply.reports)):
                if refused:
                    raise WeightMismatchError(**refused)
            raise RuntimeError(f"weight update, {type(request).__name__.lower()}: {reply.error}")
        return reply

    def _attach(self) -> Buckets:
        buckets = self._make_buckets(self.layout.size)
        dtype = str(self.dtype).removeprefix("torch.")
        manifest = [TensorEntry(name, dtype, list(shape)) for name, shape in self.layout.shapes.items()]
        description = {"transport": buckets.transport, **buckets.describe()}
        try:
            self._update(Init(manifest, self.layout.slices, description))
        except BaseException:
            buckets.close()
            raise
        self.buckets = buckets
        return buckets

    def _detach(self) -> None:
        if self.buckets is not None:
            self.buckets.close()
        self.buckets = None

    def _send(self, buckets: Buckets, clock: "_Clock") -> dict[str, int]:
        """Pack a bucket while the engine takes the one before. Returns checksums by label.

        After a failure the gathers continue, without sending: other ranks of a sharded trainer wait in them.
        """
        expected: dict[str, int] = {}
        under_way: deque[Future[Any]] = deque()
        failure: Exception | None = None
        try:
            for slices in self._gathered():
                try:
                    if failure is None:
                        expected |= self._send_bucket(buckets, slices, under_way, clock)
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
        self, buckets: Buckets, slices: list[FilledSlice], under_way: deque[Future[Any]], clock: "_Clock"
    ) -> dict[str, int]:
        """Checksums by label of a bucket that was filled and announced; at most two are under way."""
        if len(under_way) == 2:
            under_way.popleft().result()
        last, _ = slices[-1]
        index = last.bucket % len(buckets.views)
        buckets.wait(index)
        with clock("pack"):
            checksums = self._pack(buckets.views[index], slices)
        length = last.offset + last.length * self.dtype.itemsize
        buckets.send(index, length)
        under_way.append(self._sender.submit(self._update, Bucket(last.bucket, length, checksums)))
        return checksums

    def _gathered(self) -> Iterator[list[FilledSlice]]:
        """Slices with their elements, bucket by bucket. WeightMismatchError if a tensor is missing, new or reshaped."""
        offered = skip_tied(self.named_tensors())
        name, tensor = "", torch.empty(0)
        for slices in self.layout.buckets():
            bucket = []
            for part in slices:
                if part.name != name:
                    name, tensor = self._next(offered, part.name)
                bucket.append((part, flat_slice(tensor, part.start, part.length)))
            yield bucket
        for name, tensor in offered:
            raise WeightMismatchError(name, "no tensor of this name", f"one of shape {list(tensor.shape)}")

    def _next(self, offered: Iterator[tuple[str, torch.Tensor]], expected: str) -> tuple[str, torch.Tensor]:
        shape = list(self.layout.shapes[expected])
        name, tensor = next(offered, ("nothing", torch.empty(0)))
        if name != expected:
            raise WeightMismatchError(expected, f"a tensor of shape {shape}", f"{name} in its place")
        if list(tensor.shape) != shape:
            raise WeightMismatchError(name, f"shape {shape}", f"shape {list(tensor.shape)}")
        return name, tensor

    def _pack(self, view: torch.Tensor, slices: list[FilledSlice]) -> dict[str, int]:
        """Cast (round to nearest even) into the bucket. Returns checksums by label. Refuses what is not finite."""
        size = self.dtype.itemsize
        places = [view[part.offset : part.offset + part.length * size].view(self.dtype) for part, _ in slices]
        digests = pack_all([source.to(view.device) for _, source in slices], places)
        values = digests.cpu().to(torch.int64) & 0xFFFFFFFF  # waits for the device
        checksums = {}
        for (part, _), (low, high, nonfinite) in zip(slices, values.tolist(), strict=True):
            if nonfinite:
                raise WeightMismatchError(part.name, f"finite values of {self.dtype}", f"{nonfinite} that are not")
            checksums[part.label] = low | high << 32
        return checksums

    def _attest(self, expected: dict[str, int], reports: list[dict[str, Any]]) -> LogprobGap | None:
        try:
            check_checksums(expected, reports)
            gap = self._check_probes(self.probes, reports) if self.probes else None
        except WeightMismatchError:
            self._update(Attest(accepted=False))
            raise
        self._update(Attest(accepted=True))
        return gap

    def _check_probes(self, probes: ProbePrompts, reports: list[dict[str, Any]]) -> LogprobGap:
        scores = self._sender.submit(self._score, probes.token_ids)
        with _half_of_the_cores():
            trainer = probes.trainer_logprobs(probes.token_ids)
        engine = scores.result()
        if any(report["changed"] for report in reports):  # small steps of float32 may round away in bfloat16
            check_staleness(probes.tolerance, engine, trainer, self._before)
        gap = check_probes(probes.tolerance, engine, trainer)
        self._before = engine, trainer
        return gap

    def _score(self, prompts: Sequence[Sequence[int]]) -> list[Logprobs]:
        """One after another: what is batched together may round differently from publish to publish."""
        return [self.control.score(list(token_ids)) for token_ids in prompts]


def publish_paused(publisher: Publisher, version: int, mode: str = "drain") -> PublishReport:
    """Pause the engine, publish, resume. For trainers without a scheduler; mode: see EngineControl.pause.

    After a WeightMismatchError the engine stays paused: publish a complete later version.
    """
    try:
        publisher.control.pause(mode)
    except Exception:
        publisher.join_gathers()
        raise
    report = publisher.publish(version)
    publisher.control.resume()
    return report


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
