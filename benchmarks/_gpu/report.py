"""Where the stages run, their rows, and how they measure. DRY=1: everything small, on CPU, each time one pass."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

DRY = os.environ.get("DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
FLOAT, HALF = torch.float32, torch.bfloat16


def write_row(stage: str, **values: object) -> None:
    """Print a JSON line, and append it to $OUT/gpu_check.jsonl."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    line = json.dumps({"stage": stage, **rounded}, default=str)
    print(line, flush=True)
    folder = Path(os.environ.get("OUT", "gpu_out"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu_check.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Of one call, after one that warms up."""
    function()
    synchronize()
    times = []
    for _ in range(1 if DRY else rounds):
        begin = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_megabytes(function: Callable[[], object]) -> float:
    """What a call adds to the device's memory at its peak; 0 on CPU."""
    if DRY:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
