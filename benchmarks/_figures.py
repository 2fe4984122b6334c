"""The figures of docs/performance.md and README.md, computed from committed data."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import lag_map_report, smollm2
from experiments.cells import read_rows
from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference

ROOT = Path(__file__).parent.parent


class Figure(NamedTuple):
    """A row of the table. headline: README.md shows it too."""

    what: str
    figure: Callable[[], str]
    command: str
    headline: bool = False


@functools.cache
def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def _lag_map() -> dict[str, Any]:
    return read_rows(lag_map_report.DATA)


def _proof(name: str) -> Any:
    return next(found[name] for found in _read("proofs.json").values() if name in found)


def _gain_on_smollm2(objective: str) -> str:
    rows = [row for row in read_rows(smollm2.DATA).values() if row["objective"] == objective]
    pairs = [(row["evaluations"][0], row["evaluations"][-1]) for row in rows]
    gains = [paired_difference(a["n"], a["correct"], b["correct"], 1, b["n"])[0] for a, b in pairs]
    before, after = (statistics.mean(pair[i]["pass_at_k"]["1"] for pair in pairs) for i in (0, 1))
    gain, error = mean_and_error(gains)
    return f"{before:.3f} → {after:.3f} (paired {gain:+.3f} ± {error:.3f})"


def _sort9(objective: str) -> str:
    cells = []
    for lag in (64, 200, 400):
        rows = lag_map_report.select(_lag_map().values(), kind="map", objective=objective, lag=lag)
        mean, error = lag_map_report.interval(rows)
        cells.append(f"{mean:.3f} ± {error:.3f}")
    return ", ".join(cells)


def _overtakes() -> str:
    low, middle, high = np.quantile(lag_map_report.overtakes(_lag_map()), [0.05, 0.5, 0.95])
    return f"L = {middle:.0f} ({low:.0f} to {high:.0f})"


def _publish() -> str:
    row = _read("benchmarks/data/weights.json")["smollm2"]
    reload = row["vllm"]["reload from disk"]
    seconds = (row["transports"]["memfd"]["total"], row["copy"], reload, row["save"] + reload)
    return "; ".join(f"{value:.2f} s" for value in seconds)


def _kernels(dtype: str) -> dict[str, Any]:
    results = _read("benchmarks/data/kernels.json")["results"]
    return next(r for r in results if r["shape"] == "2048x576x49152" and r["dtype"] == dtype)


def _range(values: list[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _kernel_memory() -> str:
    shares: dict[str, list[float]] = {"naive": [], "Liger GRPO": []}
    for dtype in ("float32", "bfloat16"):
        peaks = _kernels(dtype)["peak_bytes"]
        for other, found in shares.items():
            found.append(peaks["ours"] / peaks[other])
    return f"{_range(shares['naive'])}x; {_range(shares['Liger GRPO'])}x"


def _kernel_growth() -> str:
    return f"{max(row['growth'] for row in _read('benchmarks/data/kernels.json')['growth']):.1%} at most"


def _kernel_times(dtype: str) -> str:
    cells = []
    for other in ("products", "Liger GRPO", "naive"):
        ratios = [
            times[ours] / times[other]
            for times in _kernels(dtype)["seconds"].values()
            for ours in ("ours", "ours, OAPL")
        ]
        cells.append(f"{_range(ratios)}x")
    return "; ".join(cells)


def _kernel_flops() -> str:
    return f"{_kernels('float32')['first_256']['ours']['flops']:.2f}"


def _modes(name: str, digits: int = 2) -> str:
    found = [_read(f"benchmarks/data/modes_{model}.json").get(name) for model in ("micro", "smollm2")]
    return ", ".join(f"{value:.{digits}f}x" for value in found if value is not None)


def _idle() -> str:
    rows = [row for row in _read("benchmarks/data/scale.json")["scaling"] if row["devices"] >= 64]
    cells = [f"{max(row[name] for row in rows):.1%}" for name in ("training_idle", "generation_idle")]
    return f"{', '.join(cells)} at most"


def _two_ranks() -> str:
    gradient, update = _proof("two ranks against one: step-1 gradients, update after ten steps, relative")
    return f"{gradient:.1e}; {update:.1e} relative"


FIGURES = [
    Figure(
        "SmolLM2-135M-Instruct, arithmetic, OAPL, L = 64, 128 steps, three seeds: held-out pass@1",
        lambda: _gain_on_smollm2("OAPL"),
        "`python -m experiments.smollm2`",
        headline=True,
    ),
    Figure("the same, GRPO with the clipped ratio", lambda: _gain_on_smollm2("GRPO-clip"), "the same"),
    Figure(
        "sort of 9 digits, five seeds: pass@1 of OAPL at L = 64, 200, 400",
        lambda: _sort9("OAPL"),
        "`python -m experiments.lag_map all`",
        headline=True,
    ),
    Figure(
        "the same, GRPO with the clipped ratio",
        lambda: _sort9("GRPO-clip"),
        "the same",
        headline=True,
    ),
    Figure("the lag above which OAPL is ahead of it (90 % of bootstraps over seeds)", _overtakes, "the same"),
    Figure(
        "complete, attested publish of SmolLM2-135M (bfloat16) into a live engine; bare two-process copy; vLLM's "
        "reload of a checkpoint; writing and reloading it",
        _publish,
        "`python -m benchmarks weights`",
        headline=True,
    ),
    Figure(
        "versions after which greedy output of 16 prompts equals that of a freshly loaded engine, of 10",
        lambda: str(_proof("versions token-exact with a fresh engine, 16 prompts each")),
        "`make test-slow`",
    ),
    Figure(
        "faults in a publish that are refused by name before anything is served, of 100",
        lambda: str(_proof("faults caught before serving, of 100")),
        "`make test-slow`",
    ),
    Figure(
        "trainer step with shared prompts: extra memory against padded batches with all logits",
        lambda: f"{_proof('memory of shared prompts against padding with all logits'):.2f}x",
        "`python -m benchmarks trainer`",
    ),
    Figure(
        "fused loss, T = 2048, D = 576, V = 49152: peak memory against naive torch; against Liger",
        _kernel_memory,
        "`python -m benchmarks kernels`",
        headline=True,
    ),
    Figure(
        "growth of that memory from 2,048 to 32,768 tokens, beyond the gradient of the hidden states",
        _kernel_growth,
        "`python -m benchmarks kernels --growth`",
    ),
    Figure(
        "time of the fused loss in float32 against its own three matrix products; Liger; naive torch",
        lambda: _kernel_times("float32"),
        "`python -m benchmarks kernels`",
    ),
    Figure("the same in bfloat16", lambda: _kernel_times("bfloat16"), "the same"),
    Figure("FLOPs of the fused loss, in units of T·D·V", _kernel_flops, "the same"),
    Figure(
        "two ranks against one: gradients of step 1; update after ten steps",
        _two_ranks,
        "`python -m pytest tests/live/test_ranks.py`",
    ),
    Figure(
        "phased, L = 32, against sync, L = 1, the same trained tokens: speed on the micro model, SmolLM2-135M",
        lambda: _modes("phased_over_sync"),
        "`python -m benchmarks modes`",
        headline=True,
    ),
    Figure(
        "async on disjoint cores against phased on both, micro model: speed",
        lambda: _modes("async_over_phased"),
        "the same",
    ),
    Figure(
        "simulated, 64 to 4096 devices, long tail, async, L = 50: idle time of training, of generation",
        _idle,
        "`python -m benchmarks scale`",
    ),
]
