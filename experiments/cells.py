"""Cells of a study: one training run each, a live engine included, kept as one line of a JSONL file.

A cell that has its line is not run again; one that was killed resumes where its run directory stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oapl_engine.errors import DIFFERENCE, OK
from oapl_engine.evaluation.evaluate import read_problems
from oapl_engine.files import append_jsonl, read_jsonl
from oapl_engine.report.metrics import read_metrics

ROOT = Path(__file__).parents[1]
CURVE = 20  # steps that a point of a kept curve is the mean of
# Curve of a study's row to the metric that it is the mean of. The names of rows are those of the committed data.
CURVES = {
    "reward_mean": "reward/all/mean",
    "entropy": "entropy/all/mean",
    "log_ratio_std": "log_ratio/std",
    "grad_norm": "optim/grad_norm",
    "tokens_generated": "tokens/generated",
}


@dataclass(frozen=True)
class Cell:
    """A run of `oapl train`: `name` is unique in its study, `tags` say what it is, `settings` override the recipe."""

    name: str
    tags: Mapping[str, Any]
    settings: Mapping[str, Any]


def run_cells(recipe: str, cells: Sequence[Cell], out: Path, runs: Path, workers: int) -> int:
    """Run what `out` has no line for yet, `workers` at a time; returns how many failed."""
    todo = [cell for cell in cells if cell.name not in read_rows(out)]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are in {out}; {len(todo)} to run", flush=True)
    lock, started, failed, done = threading.Lock(), time.monotonic(), [0], [0]

    def work(cell: Cell) -> None:
        row = run_cell(recipe, cell, runs / cell.name, workers)
        with lock:
            out.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(out, [row])
            done[0] += 1
            failed[0] += "failed" in row
            left = (time.monotonic() - started) / done[0] * (len(todo) - done[0]) / 60
            found = row.get("failed") or " → ".join(f"{e['pass_at_k']['1']:.3f}" for e in row["evaluations"])
            print(f"{done[0]}/{len(todo)} {cell.name}: {found}; {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, todo))
    return failed[0]


def run_cell(recipe: str, cell: Cell, run: Path, workers: int = 1) -> dict[str, Any]:
    """Train, then what a study keeps of the run; the rollouts are removed, the last checkpoint stays."""
    command = [sys.executable, "-m", "oapl_engine.cli", "train", recipe, "--run.dir", str(run)]
    command += as_overrides(cell.settings)
    begun = time.monotonic()
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment)
    row = {"name": cell.name, **cell.tags, "settings": dict(cell.settings), "seconds": time.monotonic() - begun}
    if done.returncode not in (OK, DIFFERENCE):  # a run that learned nothing is a result too
        return row | {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row |= what_to_keep(run)
    shutil.rmtree(run / "rollouts")
    for path in run.glob("journal.sqlite*"):
        path.unlink()
    return row


def what_to_keep(run: Path) -> dict[str, Any]:
    """Evaluations with counts per problem, curves of means over CURVE steps, the largest distance from the engine."""
    evaluations = [
        {
            "step": found.step,
            "n": found.n,
            "pass_at_k": {str(k): found.pass_at_k(k)[0] for k in (1, 5, 10) if k <= found.n},
            "correct": list(found.correct),
        }
        for found in read_problems(run)
    ]
    rows = read_metrics(run / "metrics.jsonl")
    kl = [-row["log_ratio/mean"] for row in rows if row["log_ratio/mean"] is not None]
    curves = {name: _means([row[metric] for row in rows]) for name, metric in CURVES.items()}
    return {
        "steps": rows[-1]["step"],
        "evaluations": evaluations,
        "curves": curves,
        "kl_max": max(kl, default=None),
        "lag_mean": float(np.mean([row["off_policy/mean"] for row in rows])),
        "lag_max": max(row["off_policy/max"] for row in rows),
    }


def _means(values: Sequence[float | None]) -> list[float | None]:
    """Means of CURVE steps at a time; None where nothing was measured."""
    points = [[v for v in values[i : i + CURVE] if v is not None] for i in range(0, len(values), CURVE)]
    return [round(float(np.mean(p)), 5) if p else None for p in points]


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Lines of a study by name; the last one of a name counts. A failed cell has no line: it is run again."""
    rows = {row["name"]: row for row in read_jsonl(out)}
    return {name: row for name, row in rows.items() if "failed" not in row}


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """`--section.field value` words for the command line."""
    values = {name: json.dumps(value).replace("Infinity", "inf") for name, value in settings.items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]
