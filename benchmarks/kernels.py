"""The fused policy loss against naive torch, torch with recompute, and Liger's chunked GRPO loss, forward and backward.

One head, GRPO on equal sequences, so that all contestants compute the same numbers; "ours, OAPL" has its own loss, and
with --sequences 1 shows what a sequence longer than a chunk costs when its coefficient is known at its end only. Times
are medians of interleaved rounds in one process, also as a multiple of "products": the three matrix products of our own
pass alone. Peak memory is what a fresh process adds (VmHWM after clear_refs; max_memory_allocated on a GPU). Errors are
relative to float64, of the weight's gradient on the first 256 tokens. Allocators: "default", and "warm", which keeps
freed memory (MALLOC_MMAP_MAX_=0, a large MALLOC_TRIM_THRESHOLD_): page faults are much of naive torch's time on CPU.

    python -m benchmarks kernels [--shapes 2048x576x49152] [--dtypes float32 bfloat16] [--sweep] [--json F] [--svg F]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from oapl_kernels import PolicyInputs, compiler, fused_policy_loss, matmul
from oapl_kernels.chunks import default_chunk_tokens
from oapl_kernels.objectives import Objective, grpo, oapl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ["2048x576x49152", "1024x1536x151936"]
SWEEP = [f"{t}x512x{v}" for t in (1024, 4096, 16384, 65536) for v in (32768, 131072, 262144)]
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # dense bf16


@dataclass
class Problem:
    """hidden [T, D], weight [V, D] (leaves), target [T], and the inputs of GRPO."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    behavior: Tensor
    advantage: Tensor
    offsets: Tensor
    chunk: int


def make_problem(shape: str, dtype: torch.dtype, sequences: int) -> Problem:
    tokens, depth, vocabulary = map(int, shape.split("x"))
    torch.manual_seed(0)
    hidden = torch.randn(tokens, depth, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, depth, device=DEVICE) * depth**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    behavior = torch.full((tokens,), -float(torch.tensor(vocabulary).log()), device=DEVICE)
    offsets = torch.arange(0, tokens + 1, tokens // sequences, device=DEVICE)
    advantage = torch.linspace(-1, 1, sequences, device=DEVICE)
    return Problem(hidden, weight, target, behavior, advantage, offsets, default_chunk_tokens(vocabulary, DEVICE))


def fused(backend: str, objective: Objective) -> Callable[[Problem], Tensor]:
    def loss(p: Problem) -> Tensor:
        inputs = PolicyInputs(p.behavior, p.advantage)
        count = float(len(p.advantage))
        return fused_policy_loss(
            p.hidden, p.weight, p.target, p.offsets, objective, inputs, normalizer=count, backend=backend
        ).loss

    return loss


def of_logprob(p: Problem, logprob: Tensor) -> Tensor:
    inputs = PolicyInputs(p.behavior, p.advantage, cu_seqlens=p.offsets)
    return grpo().fn(logprob, inputs) / len(p.advantage)


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


def naive_log_softmax(p: Problem) -> Tensor:
    logs = torch.log_softmax(wide_logits(p.hidden, p.weight), -1)
    return of_logprob(p, logs.gather(1, p.target[:, None])[:, 0])


def logprob_by_logsumexp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = wide_logits(hidden, weight)
    return logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, -1)


def naive_logsumexp(p: Problem) -> Tensor:
    return of_logprob(p, logprob_by_logsumexp(p.hidden, p.weight, p.target))


def recompute(p: Problem) -> Tensor:
    pieces = zip(p.hidden.split(p.chunk), p.target.split(p.chunk), strict=True)
    parts = [checkpoint(logprob_by_logsumexp, h, p.weight, y, use_reentrant=False) for h, y in pieces]
    return of_logprob(p, torch.cat(parts))


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    count = len(p.advantage)
    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    target, behavior = p.target.view(count, -1), p.behavior.view(count, -1)
    hidden = p.hidden.view(count, -1, p.hidden.shape[1])
    return function(hidden, p.weight, target, torch.ones_like(target), p.advantage, old_per_token_logps=behavior)[0]


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return of_logprob(p, -linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none", filter_eps=None))


def contestants() -> dict[str, Callable[[Problem], Tensor]]:
    """Those that run here."""
    chosen = {"ours": fused("auto", grpo()), "ours, OAPL": fused("auto", oapl(1e-3))}
    chosen |= {"ours, torch": fused("torch", grpo()), "naive log_softmax": naive_log_softmax}
    chosen |= {"naive logsumexp": naive_logsumexp, "torch recompute": recompute}
    if importlib.util.find_spec("liger_kernel"):
        chosen["Liger GRPO"] = liger
    if importlib.util.find_spec("cut_cross_entropy") and DEVICE.type == "cuda":
        chosen["cut-cross-entropy"] = cut_cross_entropy
    return chosen


def products(p: Problem) -> None:
    """The three matrix products of our own pass, and nothing else."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    native = matmul.multiplies_natively(weight.dtype, DEVICE.type)
    logits = torch.zeros(p.chunk, len(weight), device=DEVICE, dtype=matmul.wide(weight.dtype))
    grad = logits.to(weight.dtype) if native else logits
    out = torch.empty_like(hidden)
    total = matmul.WeightGradient(torch.empty(weight.shape, device=DEVICE), None, empty=True)
    for start in range(0, len(hidden), p.chunk):
        rows = slice(start, min(start + p.chunk, len(hidden)))
        size = rows.stop - start
        matmul.project(hidden[rows], weight, logits[:size])
        matmul.hidden_product(grad[:size], weight, out[rows])
        total.add(grad[:size], hidden[rows])


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, also inside our own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "oapl_kernels":
            with self:
                return compiler.FUNCTIONS[function._opname](*args, **(kwargs or {}))
        if function.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            left, right = (tensor.shape for tensor in args[-2:])
            self.flops += 2 * math.prod(left) * right[-1]
        return function(*args, **(kwargs or {}))


def seconds(function: Callable[[Problem], Tensor | None], p: Problem) -> float:
    p.hidden.grad = p.weight.grad = None
    synchronize()
    start = time.perf_counter()
    loss = function(p)
    if loss is not None:
        loss.backward()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_all(shape: str, dtype: torch.dtype, sequences: int, rounds: int) -> dict[str, float]:
    p = make_problem(shape, dtype, sequences)
    functions: dict[str, Callable[[Problem], Tensor | None]] = {"products": products, **contestants()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            taken = seconds(function, p)
            if turn or rounds == 0:  # the first round warms up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(shape: str, dtype: torch.dtype, sequences: int, name: str) -> int:
    """What one forward and backward adds at its peak, gradients included."""
    p = make_problem(shape, dtype, sequences)
    seconds(contestants()[name], make_problem("64x32x256", dtype, sequences))  # loads what is loaded once
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(contestants()[name], p)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds(contestants()[name], p)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def gradient_errors(shape: str, dtype: torch.dtype, sequences: int) -> dict[str, float]:
    tokens, depth, vocabulary = map(int, shape.split("x"))
    p = make_problem(f"{min(tokens, 256)}x{depth}x{vocabulary}", dtype, sequences)
    exact = Problem(p.hidden.detach().double().requires_grad_(), p.weight.detach().double().requires_grad_(), p.target,
                    p.behavior.double(), p.advantage.double(), p.offsets, p.chunk)  # fmt: skip
    seconds(naive_logsumexp, exact)
    errors = {}
    for name, function in contestants().items():
        if name == "ours, OAPL":  # another loss
            continue
        seconds(function, p)
        errors[name] = float((p.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm())
    return errors


def worker(task: str, shape: str, dtype: torch.dtype, sequences: int, rounds: int, name: str) -> object:
    if task == "time":
        return time_all(shape, dtype, sequences, rounds)
    return peak_bytes(shape, dtype, sequences, name) if task == "memory" else gradient_errors(shape, dtype, sequences)


def in_fresh_process(
    task: str, shape: str, dtype: str, sequences: int, rounds: int, name: str = "", **environment: str
):
    command = [sys.executable, "-m", "benchmarks", "kernels", "--worker", task, "--shapes", shape, "--dtypes", dtype]
    command += ["--sequences", str(sequences), "--rounds", str(rounds), "--name", name]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} of {name or 'all'} at {shape} {dtype} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, dtype: str, sequences: int, rounds: int, memory: bool) -> dict[str, object]:
    allocators = {"default": {}, "warm": WARM} if DEVICE.type == "cpu" else {"default": {}}
    times = {name: in_fresh_process("time", shape, dtype, sequences, rounds, **env) for name, env in allocators.items()}
    names = [name for name in times["default"] if name != "products"] if memory else []
    peaks = {name: in_fresh_process("memory", shape, dtype, sequences, rounds, name) for name in names}
    errors = in_fresh_process("error", shape, dtype, sequences, rounds)
    return {
        "shape": shape,
        "dtype": dtype,
        "sequences": sequences,
        "seconds": times,
        "peak_bytes": peaks,
        "weight_error": errors,
    }


def show(figures: dict) -> None:
    tokens, depth, vocabulary = map(int, figures["shape"].split("x"))
    print(f"\nT={tokens} D={depth} V={vocabulary} {figures['dtype']} on {device_name()}")
    peaks = figures["peak_bytes"]
    naive = max(1, peaks.get("naive log_softmax", 0))
    head = "".join(f"{allocator + ', s':>12}{'x products':>12}" for allocator in figures["seconds"])
    print(f"{'':20}{head}{'peak, MB':>10}{'x naive':>9}{'dW error':>10}{'of peak':>9}")
    for name in figures["seconds"]["default"]:
        cells = "".join(
            f"{times[name]:12.3f}{times[name] / times['products']:12.2f}" for times in figures["seconds"].values()
        )
        memory = f"{peaks[name] / 1e6:10.0f}{peaks[name] / naive:9.2f}" if name in peaks else f"{'':19}"
        error = f"{figures['weight_error'][name]:10.1e}" if name in figures["weight_error"] else f"{'':10}"
        share = 6 * tokens * depth * vocabulary / figures["seconds"]["default"][name] / peak_flops()
        print(f"{name:20}{cells}{memory}{error}{f'{share:9.0%}' if share else '':>9}")


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_flops() -> float:
    return next((value for name, value in PEAK_FLOPS.items() if device_name().startswith(name)), float("inf"))


def chart(results: list[dict]) -> str:
    """Time of each contestant as a multiple of its products, as horizontal bars."""
    rows = [(f"{r['shape']} {r['dtype']}: {name}", value / r["seconds"]["default"]["products"])
            for r in results for name, value in r["seconds"]["default"].items()]  # fmt: skip
    scale = 400 / max(value for _, value in rows)
    bars = "".join(
        f'<text x="300" y="{22 * i + 15}" text-anchor="end">{label}</text>'
        f'<rect x="308" y="{22 * i + 3}" width="{value * scale:.1f}" height="15" fill="#4878a8"/>'
        f'<text x="{312 + value * scale:.1f}" y="{22 * i + 15}">{value:.2f}</text>'
        for i, (label, value) in enumerate(rows)
    )
    size = f'width="780" height="{22 * len(rows) + 8}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">{bars}</svg>\n'


def main(argv: list[str]) -> int:
    """Print the tables; 0."""
    parser = argparse.ArgumentParser(prog="benchmarks kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TxDxV; T a multiple of --sequences")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=8, help="equal sequences that the T tokens are")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--sweep", action="store_true", help="T 1k to 64k, V 32k to 256k instead of --shapes")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--svg", help="draw the times to this file")
    parser.add_argument("--worker", choices=["time", "memory", "error"], help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        dtype = getattr(torch, options.dtypes[0])
        print(
            json.dumps(
                worker(options.worker, options.shapes[0], dtype, options.sequences, options.rounds, options.name)
            )
        )
        return 0
    results = []
    for shape in SWEEP if options.sweep else options.shapes:
        for dtype in options.dtypes:
            results.append(measure(shape, dtype, options.sequences, options.rounds, not options.no_memory))
            show(results[-1])
    if options.json:
        Path(options.json).write_text(json.dumps({"device": device_name(), "results": results}, indent=1) + "\n")
    if options.svg:
        Path(options.svg).write_text(chart(results))
    return 0
