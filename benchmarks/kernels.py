"""The fused policy loss against naive torch, torch with recompute, and Liger's chunked GRPO loss, forward and backward.

One head, GRPO on equal sequences, so that all contestants compute the same numbers; "ours, OAPL" has its own loss, and
with --sequences 1 shows what a sequence longer than a chunk costs when its coefficient is known at its end only. Times
are medians of interleaved rounds in one process, also as a multiple of "products": the three matrix products of our own
pass alone. Peak memory is what a fresh process adds (VmHWM after clear_refs, default allocator; max_memory_allocated on
a GPU), gradients included. Errors (relative to float64) and FLOPs (counted, in T*D*V) are of the first 256 tokens.
Allocators: "default", and "warm", which keeps freed memory (MALLOC_MMAP_MAX_=0, a large MALLOC_TRIM_THRESHOLD_): page
faults are much of naive torch's time on CPU.

--sweep takes one pass each, in fresh processes; cells too large for this machine are scored only, or skipped, and say
so. --growth compares our peak memory at 2,048 and 32,768 tokens. --static compiles our Triton kernels and those of
Liger and cut-cross-entropy for GPUs that need not be here. On a GPU times are also a share of its dense bf16 peak.

    python -m benchmarks kernels [--shapes 2048x576x49152] [--dtypes float32] [--json F] [--svg F]
    python -m benchmarks kernels --sweep | --growth | --static [--json F]
    python -m benchmarks kernels --show F [--svg F]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from oapl_kernels.testing import Products
from torch import Tensor

from benchmarks._contestants import DEVICE, Problem, contestants, make_problem, naive, products, scoring

SHAPES = ["2048x576x49152", "1024x1536x151936"]
# Shape and sequences; the last is one sequence.
SWEEP = [(f"{t}x256x{v}", t // 256) for t in (1024, 4096, 16384, 65536) for v in (32768, 131072, 262144)]
SWEEP += [("16384x256x32768", 1)]
GROWTH = [("2048x256x32768", 8), ("32768x256x32768", 128)]
CPU_LIMIT = 1.2e12  # FLOPs of one pass in a sweep
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # dense bf16


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


def one_pass(shape: str, dtype: torch.dtype, sequences: int, name: str) -> dict[str, float]:
    """Seconds of one forward and backward, and the bytes that it adds at its peak, gradients included."""
    function = {**contestants(), "scoring": scoring}[name]
    seconds(function, make_problem("64x32x256", dtype, sequences if 64 % sequences == 0 else 8))  # loads what is lazy
    p = make_problem(shape, dtype, sequences)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        taken = seconds(function, p)
        return {"seconds": taken, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    taken = seconds(function, p)
    return {"seconds": taken, "peak_bytes": resident("VmHWM") - before}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def errors_and_flops(shape: str, dtype: torch.dtype, sequences: int) -> dict[str, dict[str, float]]:
    """Of the weight's gradient on the first 256 tokens; FLOPs in units of T*D*V."""
    tokens, depth, vocabulary = map(int, shape.split("x"))
    p = make_problem(f"{min(tokens, 256)}x{depth}x{vocabulary}", dtype, sequences)
    exact = Problem(p.hidden.detach().double().requires_grad_(), p.weight.detach().double().requires_grad_(), p.target,
                    p.behavior.double(), p.advantage.double(), p.offsets, p.chunk)  # fmt: skip
    seconds(naive, exact)
    found = {}
    for name, function in contestants().items():
        with Products() as meter:
            seconds(function, p)
        error = float((p.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm())
        found[name] = {"flops": meter.flops / (len(p.hidden) * depth * vocabulary)}
        found[name] |= {} if name == "ours, OAPL" else {"error": error}  # another loss
    return found


def worker(task: str, shape: str, dtype: torch.dtype, sequences: int, rounds: int, name: str) -> object:
    if task == "time":
        return time_all(shape, dtype, sequences, rounds)
    if task == "pass":
        return one_pass(shape, dtype, sequences, name)
    return errors_and_flops(shape, dtype, sequences)


def in_fresh_process(
    task: str, shape: str, dtype: str, sequences: int, rounds: int = 0, name: str = "", **environment: str
):
    command = [sys.executable, "-m", "benchmarks", "kernels", "--worker", task, "--shapes", shape, "--dtypes", dtype]
    command += ["--sequences", str(sequences), "--rounds", str(rounds), "--name", name]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{task} of {name or 'all'} at {shape} {dtype} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, dtype: str, sequences: int, rounds: int, memory: bool) -> dict:
    allocators = {"default": {}, "warm": WARM} if DEVICE.type == "cpu" else {"default": {}}
    times = {name: in_fresh_process("time", shape, dtype, sequences, rounds, **env) for name, env in allocators.items()}
    names = [name for name in times["default"] if name != "products"] if memory else []
    peaks = {name: in_fresh_process("pass", shape, dtype, sequences, name=name)["peak_bytes"] for name in names}
    figures = {"device": device_name(), "shape": shape, "dtype": dtype, "sequences": sequences, "seconds": times}
    return figures | {"peak_bytes": peaks, "first_256": in_fresh_process("error", shape, dtype, sequences)}


def show(figures: dict) -> None:
    tokens, depth, vocabulary = map(int, figures["shape"].split("x"))
    print(f"\nT={tokens} D={depth} V={vocabulary} {figures['dtype']} on {figures['device']}")
    peaks, share_of = figures["peak_bytes"], peak_flops(figures["device"])
    head = "".join(f"{allocator + ', s':>12}{'x products':>12}" for allocator in figures["seconds"])
    print(f"{'':20}{head}{'peak, MB':>10}{'x naive':>9}{'dW error':>10}{'FLOPs/TDV':>11}{'of peak':>9}")
    for name in figures["seconds"]["default"]:
        line = f"{name:20}" + "".join(
            f"{times[name]:12.3f}{times[name] / times['products']:12.2f}" for times in figures["seconds"].values()
        )
        line += f"{peaks[name] / 1e6:10.0f}{peaks[name] / max(1, peaks['naive']):9.2f}" if name in peaks else f"{'':19}"
        found = figures["first_256"].get(name, {})
        line += f"{found['error']:10.1e}" if "error" in found else f"{'':10}"
        line += f"{found['flops']:11.2f}" if "flops" in found else f"{'':11}"
        share = 6 * tokens * depth * vocabulary / figures["seconds"]["default"][name] / share_of
        print(line + (f"{share:9.0%}" if share else ""))


def sweep_cell(shape: str, sequences: int, dtype: str) -> dict:
    tokens, depth, vocabulary = map(int, shape.split("x"))
    unit = tokens * depth * vocabulary
    cell = {"shape": shape, "sequences": sequences, "dtype": dtype, "device": device_name(), "passes": {}}
    names = [name for name in contestants() if name != "ours, torch"]
    if DEVICE.type == "cpu" and 6 * unit > CPU_LIMIT:
        names = ["scoring"]
    if DEVICE.type == "cpu" and 2 * unit > 2 * CPU_LIMIT:
        return cell | {"skipped": f"{2 * unit:.1e} FLOPs to score it, over {2 * CPU_LIMIT:.1e} on CPU"}
    for name in names:
        needed = 16 * tokens * vocabulary  # fp32 logits, their log-softmax and the gradients of both
        if name == "naive" and needed > free_bytes():
            cell["skipped"] = f"naive: {needed / 1e9:.0f} GB of logits and their gradients"
            continue
        cell["passes"][name] = in_fresh_process("pass", shape, dtype, sequences, name=name)
    return cell


def free_bytes() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    line = next(x for x in lines if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 * 0.7


def show_cell(cell: dict) -> None:
    parts = [f"{k} {v['seconds']:.2f} s {v['peak_bytes'] / 1e6:.0f} MB" for k, v in cell["passes"].items()]
    parts += [f"skipped: {cell['skipped']}"] if "skipped" in cell else []
    print(f"{cell['shape']:18}{cell['sequences']:4} sequences  {cell['dtype']:9} {'; '.join(parts)}")


def growth(dtype: str) -> dict:
    """Our peak memory at two lengths, beyond the gradient of hidden [T, D]."""
    width = getattr(torch, dtype).itemsize
    beyond = {}
    for shape, sequences in GROWTH:
        tokens, depth, _ = map(int, shape.split("x"))
        peak = in_fresh_process("pass", shape, dtype, sequences, name="ours, OAPL")["peak_bytes"]
        beyond[shape] = peak - tokens * depth * width
    first, second = beyond.values()
    return {"dtype": dtype, "beyond_hidden_gradient": beyond, "growth": second / first - 1}


def show_growth(figures: dict) -> None:
    parts = ", ".join(f"{shape} {value / 1e6:.0f} MB" for shape, value in figures["beyond_hidden_gradient"].items())
    print(f"peak beyond the gradient of hidden, {figures['dtype']}: {parts}: {figures['growth']:+.1%}")


def show_static(rows: list[dict]) -> None:
    names = ("registers", "spills", "shared", "shared_limit", "instructions")
    print(f"\n{'ahead of time':28}{'target':>9}" + "".join(f"{name:>14}" for name in names))
    for row in rows:
        cells = row.get("error") or "".join(f"{row[name]:>14}" for name in names)
        print(f"{row['kernel']:28}{row['target']:>9}{cells}")


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_flops(device: str) -> float:
    return next((value for name, value in PEAK_FLOPS.items() if device.startswith(name)), float("inf"))


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


def collect(options: argparse.Namespace) -> dict[str, list[dict]]:
    """What was asked for, measured and shown one by one."""

    def each(show_one, measured):
        return [show_one(figures) or figures for figures in measured]

    dtypes = options.dtypes
    if options.static:
        from benchmarks._ahead_of_time import side_by_side

        rows = side_by_side()
        show_static(rows)
        return {"static": rows}
    if options.sweep:
        return {"sweep": each(show_cell, (sweep_cell(*cell, dtype) for dtype in dtypes for cell in SWEEP))}
    if options.growth:
        return {"growth": each(show_growth, map(growth, dtypes))}
    rest = (options.sequences, options.rounds, not options.no_memory)
    return {"results": each(show, (measure(shape, dtype, *rest) for shape in options.shapes for dtype in dtypes))}


def show_all(figures: dict[str, list[dict]]) -> None:
    for key, one in (("results", show), ("sweep", show_cell), ("growth", show_growth)):
        for entry in figures.get(key, []):
            one(entry)
    if "static" in figures:
        show_static(figures["static"])


def main(argv: list[str]) -> int:
    """Print the tables; 0."""
    parser = argparse.ArgumentParser(prog="benchmarks kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TxDxV; T a multiple of --sequences")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=8, help="equal sequences that the T tokens are")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--sweep", action="store_true", help="T 1k to 64k, V 32k to 256k, one 16k-token sequence")
    parser.add_argument("--growth", action="store_true", help="peak memory at 2,048 and at 32,768 tokens")
    parser.add_argument("--static", action="store_true", help="registers, spills, shared memory ahead of time")
    parser.add_argument("--json", help="write the figures to this file, beside what else is in it")
    parser.add_argument("--show", metavar="FILE", help="print the figures of such a file, measure nothing")
    parser.add_argument("--svg", help="draw the times to this file")
    parser.add_argument("--worker", choices=["time", "pass", "error"], help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        rest = (options.sequences, options.rounds, options.name)
        print(json.dumps(worker(options.worker, options.shapes[0], getattr(torch, options.dtypes[0]), *rest)))
        return 0
    if options.show:
        figures = json.loads(Path(options.show).read_text(encoding="utf-8"))
        show_all(figures)
    else:
        figures = collect(options)
    if options.json:
        file = Path(options.json)
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for key, entries in figures.items():
            kept = [] if key == "static" else known.get(key, [])
            same = ("shape", "dtype", "sequences", "device")
            new = [[entry.get(name) for name in same] for entry in entries]
            known[key] = [e for e in kept if [e.get(name) for name in same] not in new] + entries
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        Path(options.svg).write_text(chart(figures["results"]), encoding="utf-8")
    return 0
