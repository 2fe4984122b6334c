"""sync against phased against async on this machine, to the same trained tokens; and what the simulator says of each.

Every run is `oapl train` with a live engine, in a process of its own; its time is from the engine being ready to its
last step, read from events.jsonl. No evaluation, one checkpoint at the end. "phased, one core" is the machine from
which the other runs are predicted; "bound" is what phased would take if nothing but its own phases took time.

    python -m benchmarks modes [--model micro] [--runs DIR] [--only NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._machine import fit_machine
from oapl_engine.config import load_recipe
from oapl_engine.report.metrics import read_metrics
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import read_record
from oapl_engine.scheduler.simulate import simulate
from oapl_engine.scheduler.state import Settings

RECIPES = {"micro": "recipes/micro.toml", "smollm2": "recipes/quickstart.toml"}
COMMON = {"micro": "--schedule.steps 128", "smollm2": "--schedule.steps 32 --schedule.groups_per_step 2"}
MODES = {
    "sync": "--schedule.mode sync --schedule.lag 1",
    "phased": "--schedule.mode phased --schedule.lag 32",
    "async": "--schedule.mode async --schedule.lag 32 --schedule.on_publish keep --run.threads 1",
    "phased, one core": "--schedule.mode phased --schedule.lag 32 --run.threads 1",
}
RUNS = {"micro": list(MODES), "smollm2": ["sync", "phased"]}
PHASES = ("generate", "train", "publish", "attest")


def main(argv: list[str]) -> int:
    """Measure what is missing in --runs, print the tables; 0, or 2 for bad input, or 1 where a run failed."""
    parser = argparse.ArgumentParser(prog="benchmarks modes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=sorted(RECIPES), default="micro")
    parser.add_argument("--runs", help="folder of the runs; those that are finished there are not run again")
    parser.add_argument("--only", choices=sorted(MODES), help="run this one alone, and report nothing yet")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(argv)
    folder = Path(options.runs or tempfile.mkdtemp(prefix="oapl-modes-"))
    names = [options.only] if options.only else RUNS[options.model]
    for name in names:
        if not finished(folder / name):
            train(options.model, name, folder / name)
    if options.only:
        return 0
    figures = report(folder, names)
    if options.json:
        text = json.dumps({"model": options.model, **figures}, indent=1) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    return 0


def finished(run: Path) -> bool:
    return any((run / "checkpoints").glob("step_*"))


def train(model: str, name: str, run: Path) -> None:
    words = f"{RECIPES[model]} {COMMON[model]} {MODES[name]} --evaluation.n 0 --checkpoint.every 1000000".split()
    one_core = ["taskset", "-c", "0"] if name == "phased, one core" else []
    command = [*one_core, sys.executable, "-m", "oapl_engine.cli", "train", *words, "--run.dir", str(run)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_core else {})
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def report(folder: Path, names: list[str]) -> dict[str, Any]:
    records = {name: read_record(folder / name / "events.jsonl") for name in names}
    settings = {name: Settings.from_recipe(load_recipe(folder / name / "config.toml")) for name in names}
    groups = load_recipe(folder / names[0] / "config.toml").schedule.group_size
    machines = {name: fit_machine([records[name]], groups) for name in names if name != "async"}
    machines["sync and phased"] = fit_machine([records["sync"], records["phased"]], groups)
    print(f"{'run':18}{'seconds':>9}{'tokens':>9}{'tokens/s':>10}   own simulation, ratio   predicted from: ratio")
    rows = {}
    for name in names:
        rows[name] = measured(folder / name, records[name])
        said = {other: simulate(m, settings[name]).seconds for other, m in machines.items()}
        rows[name]["simulated"] = {other: seconds / rows[name]["seconds"] for other, seconds in said.items()}
        show(name, rows[name])
    figures: dict[str, Any] = {"runs": rows}
    sync, phased = rows["sync"], rows["phased"]
    speedup = phased["tokens_per_second"] / sync["tokens_per_second"]
    bound = speedup * phased["seconds"] / phased["phase_seconds"]
    print(f"phased L = 32 against sync, trained tokens/s: {speedup:.2f}x; bound from phased's own phases: {bound:.2f}x")
    figures |= {"phased_over_sync": speedup, "bound": bound, "share_of_bound": speedup / bound}
    if "async" in rows:
        figures["async_over_phased"] = rows["async"]["tokens_per_second"] / phased["tokens_per_second"]
        print(f"async on disjoint cores against phased on all: {figures['async_over_phased']:.2f}x")
    return figures


def measured(run: Path, record: list[tuple[float, Any]]) -> dict[str, Any]:
    """Seconds from the engine being ready to the last step, tokens trained, and the sum of the phases in between."""
    steps = [at for at, message in record if isinstance(message, e.StepDone)]
    rows = read_metrics(run / "metrics.jsonl")
    phases = {phase: sum(row[f"time/{phase}"] or 0.0 for row in rows) for phase in PHASES}
    seconds = steps[-1] - record[0][0]
    tokens = sum(row["tokens/trained"] or 0.0 for row in rows)
    return {
        "seconds": seconds,
        "tokens_trained": tokens,
        "tokens_per_second": tokens / seconds,
        "phases": phases,
        "phase_seconds": sum(phases.values()),
        "lag_max": max(row["off_policy/max"] for row in rows),
    }


def show(name: str, row: dict[str, Any]) -> None:
    own = row["simulated"].get(name)
    others = ", ".join(f"{other}: {ratio:.2f}" for other, ratio in row["simulated"].items() if other != name)
    head = f"{name:18}{row['seconds']:9.1f}{row['tokens_trained']:9.0f}{row['tokens_per_second']:10.0f}"
    print(f"{head}   {'-' if own is None else f'{own:.2f}':>21}   {others}")
