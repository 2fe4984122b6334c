"""The kernels on this device: their errors against float64, and what they take."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from oapl_kernels import linear_logprob, sequence_sum, testing, weight_pack
from oapl_kernels.objectives import grpo, oapl
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import _contestants as contest
from benchmarks._gpu.report import DEVICE, DRY, FLOAT, HALF, median_seconds, peak_megabytes, write_row
from benchmarks.kernels import seconds
from tests.support import head_reference
from tests.support.fresh_memory import nan_in_fresh_memory

CHUNK = 4096  # rows of the chunks that torch.compile gets
NAIVE_LIMIT = 3e9  # logits: beyond, only ours is timed
SPEED_SHAPES = (("8192x2560x151936", 16), ("16384x576x49152", 32), ("32768x2560x151936", 4))


def check_kernels() -> None:
    """The promise of docs/kernels.md on this device: an error against float64 of at most twice torch's own."""
    comparisons, failures = 0, []
    with nan_in_fresh_memory():
        for failure in _compare_heads():
            comparisons += 1
            failures += [failure] if failure else []
    failures += [*_check_packing(), *_check_sequence_sum()]
    write_row("kernels", comparisons=comparisons, failures=failures, launches=dict(testing.LAUNCHES))


def _compare_heads() -> Iterator[str]:
    """Per comparison what is wrong with it; "" if nothing."""
    ways = (
        (head_reference.fused, oapl(0.05)),
        (head_reference.fused, grpo()),
        (head_reference.through_logprob, oapl(0.05)),
    )
    for dtype in (FLOAT,) if DRY else (FLOAT, HALF):
        for name in list(head_reference.ODD)[: 2 if DRY else None]:
            for way, objective in ways:
                yield _compare_head(way, objective, name, dtype)


def _compare_head(way: Callable[..., object], objective: object, name: str, dtype: torch.dtype) -> str:
    def make(seed: int) -> object:
        case = head_reference.odd_case(name, objective, seed, dtype)
        return replace(_on_device(case), inputs=_on_device(case.inputs))

    try:
        head_reference.compare(way, make, dtype)
    except Exception as error:
        label = f"{dtype} {name} {way.__name__} {objective.name}"
        return f"{label}: {type(error).__name__} {str(error)[:160]}"
    return ""


def _on_device(record: object) -> object:
    moved = {name: value.to(DEVICE) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **moved)


def _check_packing() -> Iterator[str]:
    """Cast and checksum have the bits that they have on the CPU."""
    for count in (1, 2, 7, 2047, 2048, 100_003):
        for dtype in (FLOAT, HALF):
            source, place = torch.randn(count, device=DEVICE), torch.zeros(count, dtype=dtype, device=DEVICE)
            low, high, nonfinite = (int(value) & 0xFFFFFFFF for value in weight_pack.pack(source, place).cpu())
            (expected,) = weight_pack.checksum_all([source.to(dtype).cpu()])
            if (low | high << 32) != expected or nonfinite or not torch.equal(place, source.to(dtype)):
                yield f"pack of {count} {dtype}"


def _check_sequence_sum() -> Iterator[str]:
    values = torch.randn(5000, device=DEVICE)
    offsets = torch.tensor([0, 1, 1, 3000, 5000], device=DEVICE)
    exact = [values[start:end].double().sum() for start, end in itertools.pairwise(offsets.tolist())]
    if (sequence_sum(values, offsets).double() - torch.stack(exact)).abs().max() > 1e-4:
        yield "sequence_sum"


def measure_speed() -> None:
    """Time, share of the measured bf16 rate and peak memory of loss with gradients, of scoring, of the row kernels."""
    size = 64 if DRY else 8192
    square = torch.randn(size, size, device=DEVICE).to(HALF)
    rate = 2 * size**3 / median_seconds(lambda: square @ square)
    write_row("ceiling", bf16_tflops=rate / 1e12)
    for shape, sequences in (("64x32x256", 8),) if DRY else SPEED_SHAPES:
        _measure_shape(shape, sequences, rate)


def _measure_shape(shape: str, sequences: int, rate: float) -> None:
    tokens, depth, vocabulary = map(int, shape.split("x"))
    problem = contest.make_problem(shape, HALF, sequences)
    chunk = contest.logprob_by_logsumexp if DRY else torch.compile(contest.logprob_by_logsumexp, dynamic=False)

    def compiled(p: contest.Problem) -> Tensor:
        pieces = zip(p.hidden.split(CHUNK), p.target.split(CHUNK), strict=True)
        parts = [checkpoint(chunk, hidden, p.weight, target, use_reentrant=False) for hidden, target in pieces]
        return contest.grpo_loss(p, torch.cat(parts))

    functions = {"products": contest.products, **contest.contestants(), "torch.compile chunked": compiled}
    if tokens * vocabulary > NAIVE_LIMIT:
        functions = {name: functions[name] for name in ("products", "ours", "ours, OAPL")}
    for name, function in functions.items():
        try:
            _measure_loss(shape, name, function, problem, 6 * tokens * depth * vocabulary / rate)
        except Exception as error:  # one that does not run here, or runs out of memory, is a row
            write_row("speed", shape=shape, what=name, failed=f"{type(error).__name__} {str(error)[:200]}")
        problem.hidden.grad = problem.weight.grad = None
    with torch.no_grad():
        seconds = median_seconds(lambda: linear_logprob(problem.hidden, problem.weight, problem.target))
    write_row("scoring", shape=shape, ms=seconds * 1e3, share=2 * tokens * depth * vocabulary / seconds / rate)
    if not DRY:
        _measure_rows(problem.target[:CHUNK], vocabulary)


def _measure_loss(
    shape: str, name: str, function: Callable[..., object], problem: contest.Problem, at_peak: float
) -> None:
    def run() -> object:
        return seconds(function, problem)

    taken = median_seconds(run, 5)
    peak = peak_megabytes(run)
    write_row("speed", shape=shape, what=name, ms=taken * 1e3, share=at_peak / taken, peak_mb=peak)


def _measure_rows(target: Tensor, vocabulary: int) -> None:
    """Bytes per second of the kernels that read and write a chunk's logits."""
    from oapl_kernels import epilogue_triton

    logits, scale = torch.randn(len(target), vocabulary, device=DEVICE), torch.ones(len(target), device=DEVICE)
    out = torch.empty(4, len(target), device=DEVICE)
    statistics = median_seconds(lambda: epilogue_triton.statistics(logits, target, 1.0, None, out))
    gradient = median_seconds(lambda: epilogue_triton.gradient(logits, target, out, scale, None, 1.0, None, HALF))
    read, both = logits.nbytes / 1e9, 1.5 * logits.nbytes / 1e9
    write_row("rows", V=vocabulary, statistics_gb_s=read / statistics, gradient_gb_s=both / gradient)
