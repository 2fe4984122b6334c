"""Publisher: one version of the trainer's weights into one live engine, complete and attested before it serves."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from oapl_kernels.weight_pack import combine_checksums

from oapl_engine.stopwatch import Stopwatch
from oapl_engine.weights.attest import (
    LogprobGap,
    Logprobs,
    ProbePrompts,
    WeightMismatchError,
    check_checksums,
    check_probes,
    check_staleness,
)
from oapl_engine.weights.bucket_layout import BucketLayout, NamedTensors, join_gathers, lay_out
from oapl_engine.weights.control import (
    Attest,
    EngineControl,
    Finish,
    Init,
    Start,
    TensorEntry,
    UpdateReply,
    UpdateRequest,
)
from oapl_engine.weights.send import send_version
from oapl_engine.weights.transports import Buckets, make_buckets


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

    def publish(self, version: int) -> PublishReport:
        """Send and attest. The engine must be paused; it may be resumed when this returns.

        Raises WeightMismatchError (the engine then serves nothing until a complete later version is published) and what
        `control` raises.
        """
        clock = Stopwatch()
        with clock.measure("total"):
            if self.buckets is None:
                self.layout = lay_out(self.named_tensors(), self.dtype, self.bucket_bytes)
            buckets = self._prepare(version, clock)
            try:
                with clock.measure("transfer"):
                    expected = send_version(self.layout, self.named_tensors, self.dtype, buckets, self._update, clock)
                with clock.measure("finish"):
                    reports = self._update(Finish()).reports
            except BaseException:
                self.close()  # a transport may be stuck in the middle, and the engine's plan may be what is wrong
                raise
            with clock.measure("attest"):
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
        self.close()
        self._before = None

    def close(self) -> None:
        """Leave the buckets; a later publish makes new ones."""
        if self.buckets is not None:
            self.buckets.close()
        self.buckets = None

    def _prepare(self, version: int, clock: Stopwatch) -> Buckets:
        """An engine that is attached and waits for the first bucket of a version."""
        try:
            with clock.measure("init"):
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
        engine, trainer = _score_probes(probes, self.control)
        if any(report["changed"] for report in reports):  # small steps of float32 may round away in bfloat16
            check_staleness(probes.tolerance, engine, trainer, self._before)
        gap = check_probes(probes.tolerance, engine, trainer)
        self._before = engine, trainer
        return gap


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


def _score_probes(probes: ProbePrompts, control: EngineControl) -> tuple[list[Logprobs], list[Logprobs]]:
    """Log-probs of the engine and of the trainer, computed at the same time.

    The engine scores one prompt after another: what is batched together may round differently from publish to publish.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, thread_name_prefix="score") as pool:
        engine = pool.submit(lambda: [control.score(list(token_ids)) for token_ids in probes.token_ids])
        # Two full teams of threads on the same cores wait for each other at barriers.
        torch.set_num_threads(-(-threads // 2))
        try:
            trainer = probes.trainer_logprobs(probes.token_ids)
        finally:
            torch.set_num_threads(threads)
        return engine.result(), trainer
