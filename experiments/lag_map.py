"""The lag map: which objective learns at which lag?

    python -m experiments.lag_map tune     four settings an objective at L = 16 and L = 200, on other problems
    python -m experiments.lag_map map      5 objectives x 5 lags x 5 seeds with the settings that won
    python -m experiments.lag_map variants what moves the crossover: scale-free beta2, drift, windows, beta1, epochs

Each cell trains the micro model (sort 9 digits) against a live vLLM engine. Lines go to experiments/data/lag_map.jsonl;
the same command goes on where it was stopped. `python -m experiments.lag_map_report` draws and tabulates.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.cells import ROOT, Cell, read_rows, run_cells
from oapl_engine.errors import guarded
from oapl_engine.evaluation.pass_at_k import mean_and_error, pass_at_k_each

RECIPE = "recipes/micro_sort9.toml"
DATA = ROOT / "experiments" / "data" / "lag_map.jsonl"
LAGS = (1, 16, 64, 200, 400)
TUNED_AT = (16, 200)
TUNING_SEED = 1000
HELD_OUT = 256  # problems of the evaluation; tuning looks at the next 256
LR = "optimizer.learning_rate"


def _oapl(beta1: float, beta2: float, rate: float) -> dict[str, Any]:
    return {"objective.name": "oapl", "objective.beta1": beta1, "objective.beta2": beta2, LR: rate}


def _kimi(tau: float, rate: float) -> dict[str, Any]:
    return {"objective.name": "kimi", "objective.beta2": tau, LR: rate}


def _grpo(name: str, rate: float, **options: Any) -> dict[str, Any]:
    chosen = {f"objective.options.{key}": value for key, value in options.items()}
    return {"objective.name": name, **chosen, LR: rate}


# Four settings each, over what matters for it: the budget is the same for all. At 3e-4 the clipped ratio collapses.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "OAPL": [_oapl(1.0, 0.1, 1e-4), _oapl(4.0, 0.1, 1e-4), _oapl(4.0, 0.05, 1e-4), _oapl(4.0, 0.1, 2e-4)],
    "GRPO-clip": [_grpo("grpo", r, clip_low=c, clip_high=c) for r, c in itertools.product((5e-5, 1e-4), (0.2, 0.4))],
    "GRPO uncorrected": [_grpo("grpo", r, corrected=False) for r in (1.25e-5, 2.5e-5, 5e-5, 1e-4)],
    "GRPO+TIS": [
        _grpo("tis", r, cap=2.0, level=level) for r, level in itertools.product((5e-5, 1e-4), ("token", "sequence"))
    ],
    "Kimi PMD": [_kimi(tau, rate) for tau, rate in itertools.product((0.05, 0.1), (1e-4, 2e-4))],
}
TUNING = {"data.held_out": 2 * HELD_OUT, "evaluation.n": 4, "evaluation.k": [1]}


def tuning_cells() -> list[Cell]:
    """Every setting at the lags that are tuned."""
    return [
        _cell("tune", objective, lag, TUNING_SEED, settings | TUNING, setting=index)
        for lag, (objective, choices) in itertools.product(TUNED_AT, SETTINGS.items())
        for index, settings in enumerate(choices)
    ]


def map_cells(rows: dict[str, dict[str, Any]], seeds: int) -> list[Cell]:
    """5 objectives x 5 lags, seed after seed, so that a map stopped early is an even one."""
    best = {(objective, lag): best_setting(rows, objective, lag) for objective in SETTINGS for lag in LAGS}
    return [
        _cell("map", objective, lag, seed, SETTINGS[objective][best[objective, lag]], setting=best[objective, lag])
        for seed, lag, objective in itertools.product(range(seeds), LAGS, SETTINGS)
    ]


def variant_cells(rows: dict[str, dict[str, Any]], seeds: int) -> list[Cell]:
    """OAPL as tuned for the lag, with one thing changed; the strongest other with what saves generations; and whether
    the learning rate, which was tuned at L = 16, is what holds OAPL back at L = 1."""
    epochs = {"4 epochs a window": {"schedule.max_uses": 4}}
    half_rate = {"learning rate 1e-4": {LR: 1e-4}}
    changes: dict[str, dict[str, Any]] = {
        "beta1 = 1": {"objective.beta1": 1.0},
        "beta1 = inf": {"objective.beta1": math.inf},
        "scale-free, 5 nats": {"objective.scale_free_nats": 5.0},
        "publish by drift, 0.2 nats": {"schedule.max_kl": 0.2},
        "async, window 2": {"schedule.mode": "async", "schedule.window": 2},
        "equal groups kept": {"objective.equal_groups": "keep"},
        **epochs,
    }
    varied_at = (("OAPL", (64, 200), changes), ("GRPO-clip", (64, 200), epochs), ("OAPL", (1,), half_rate))
    return [
        _cell(f"variant/{name}", objective, lag, seed, SETTINGS[objective][best_setting(rows, objective, lag)] | change)
        for objective, lags, varied in varied_at
        for seed, lag, (name, change) in itertools.product(range(seeds), lags, varied.items())
    ]


def best_setting(rows: dict[str, dict[str, Any]], objective: str, lag: int) -> int:
    """Number of the setting with the highest final pass@1 on the tuning problems, at the tuned lag nearest in ratio."""
    near = min(TUNED_AT, key=lambda tuned: abs(math.log(lag / tuned)))
    found = {
        row["setting"]: tuning_score(row)
        for row in rows.values()
        if row["kind"] == "tune" and row["objective"] == objective and row["lag"] == near
    }
    if len(found) < len(SETTINGS[objective]):
        sys.exit(f"{len(found)} of {len(SETTINGS[objective])} settings of {objective} are tuned: run `tune` first")
    return max(found, key=lambda index: found[index])


def tuning_score(row: dict[str, Any]) -> float:
    """Final pass@1 on the problems that the map's evaluation does not use."""
    last = row["evaluations"][-1]
    return mean_and_error(pass_at_k_each(last["n"], last["correct"][HELD_OUT:], 1))[0]


def _cell(kind: str, objective: str, lag: int, seed: int, settings: dict[str, Any], **tags: Any) -> Cell:
    """`kind` names the table it belongs to; twice the lag is trained where 400 steps would not publish twice."""
    name = "/".join([kind, objective, f"L{lag}", *(f"setting{v}" for v in tags.values()), f"seed{seed}"])
    schedule = {"schedule.lag": lag, "schedule.steps": max(400, 2 * lag), "run.seed": seed}
    # a run that other jobs may stop for a while has no business with time limits
    common = {"reward.timeout_seconds": 900.0, "checkpoint.every": max(400, 2 * lag)}
    shared = {"kind": kind, "objective": objective, "lag": lag, "seed": seed, **tags}
    return Cell(name.replace(" ", "_").replace(",", ""), shared, schedule | common | settings)


def _cells(what: str, out: Path, seeds: int) -> Iterator[list[Cell]]:
    if what in ("tune", "all"):
        yield tuning_cells()
    if what in ("map", "all"):
        yield map_cells(read_rows(out), seeds)
    if what in ("variants", "all"):
        yield variant_cells(read_rows(out), min(seeds, 3))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lag_map", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", choices=["tune", "map", "variants", "all"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "lag_map", help="run directories")
    arguments = parser.parse_args(argv)
    failed = 0
    for cells in _cells(arguments.what, arguments.out, arguments.seeds):
        failed += run_cells(RECIPE, cells, arguments.out, arguments.runs, arguments.workers)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
