"""SmolLM2-135M-Instruct at L = 64: OAPL against GRPO with the clipped ratio, three seeds, held-out problems.

`python -m experiments.smollm2` runs six trainings of the quickstart's task (each about ten minutes on two idle cores)
and prints the table; the same command goes on where it was stopped. One setting each, that of the quickstart: untuned.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from experiments.cells import ROOT, Cell, read_rows, run_cells
from oapl_engine.errors import guarded
from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference

RECIPE = "recipes/quickstart.toml"
DATA = ROOT / "experiments" / "data" / "smollm2.jsonl"
LAG, STEPS = 64, 128
OBJECTIVES: dict[str, dict[str, Any]] = {
    "OAPL": {"objective.name": "oapl"},
    "GRPO-clip": {"objective.name": "grpo"},
}


def cells(seeds: int) -> list[Cell]:
    common = {"schedule.lag": LAG, "schedule.steps": STEPS, "checkpoint.every": STEPS, "evaluation.n": 8}
    return [
        Cell(f"{name}/seed{seed}", {"objective": name, "seed": seed}, common | {"run.seed": seed} | settings)
        for seed, (name, settings) in itertools.product(range(seeds), OBJECTIVES.items())
    ]


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Held-out pass@1 by run, the paired difference to the start, and the mean over seeds."""
    lines = ["| run | before | after | paired difference |", "|---|---|---|---|"]
    gains: dict[str, list[float]] = {}
    for name, row in sorted(rows.items()):
        first, last = row["evaluations"][0], row["evaluations"][-1]
        gain, error = paired_difference(first["n"], first["correct"], last["correct"], 1, last["n"])
        gains.setdefault(row["objective"], []).append(gain)
        before, after = (evaluation["pass_at_k"]["1"] for evaluation in (first, last))
        lines.append(f"| {name} | {before:.3f} | {after:.3f} | {gain:+.3f} ± {error:.3f} |")
    for objective, values in gains.items():
        mean, error = mean_and_error(values)
        lines.append(f"| {objective}, mean of {len(values)} seeds | | | {mean:+.3f} ± {error:.3f} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.smollm2", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "smollm2", help="run directories")
    arguments = parser.parse_args(argv)
    failed = run_cells(RECIPE, cells(arguments.seeds), arguments.out, arguments.runs, arguments.workers)
    print("\n".join(table(read_rows(arguments.out))))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
