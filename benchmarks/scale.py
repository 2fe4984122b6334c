"""One to thousands of devices in virtual time: idle shares, tokens/s, lag and cleared groups over L, mode and devices.

The real driver and the real core run on simulated engines and a simulated trainer (scheduler/simulate.py): long-tailed
lengths, verdicts, engines that die, costs of sleep, wake, publish. The costs below are assumptions for a 7B model on
80 GB GPUs, or, with --run, those of a run of yours, from its events.jsonl. Every advice is for its machine alone.

    python -m benchmarks scale [--devices 64,4096] [--json FILE] [--svg FILE]
    python -m benchmarks scale --run runs/sync --run runs/phased [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._machine import fit_machine
from oapl_engine.config import load_recipe
from oapl_engine.errors import ConfigError
from oapl_engine.schedule_config import MODES
from oapl_engine.scheduler.driver import read_record
from oapl_engine.scheduler.simulate import Machine, simulate
from oapl_engine.scheduler.state import Settings

SCALES = (64, 128, 256, 512, 1024, 2048, 4096)
SMALL = (1, 2, 8, 64)
LAGS = {"sync": (1,), "phased": (16, 50, 200), "phased keep": (16, 50, 200), "async": (16, 50, 100, 200)}
SPARE = 1.25  # max_groups_ahead of "phased keep" over what a phase trains: the slowest continue in the next phase
TRAINING_IDLE, GENERATION_IDLE = 0.03, 0.05  # the bar for 64 and more devices, L = 50, one window carried
TRAIN_TOKENS_PER_SECOND = 7000.0  # assumed: 7B at 30 % of an H100's peak
GPU = Machine(  # assumed: 7B, 16 samples per prompt, answers of 4k tokens in the mean and 16k at most
    engines=1,
    slots=64,
    token_seconds=1 / 60,
    crowding=(1 / 40 - 1 / 60) / 64,
    group_size=16,
    tokens_mean=4000,
    tokens_sigma=0.8,
    tokens_most=16384,
    verify_seconds=2.0,
    failure_seconds=30 * 86400.0,
    restart_seconds=300.0,
    costs={"Publish": 5.0, "Checkpoint": 10.0, "Sleep": 2.0, "Wake": 2.0, "LoadTrainer": 4.0, "OffloadTrainer": 4.0},
)


def main(argv: list[str]) -> int:
    """Print the tables and the advice; 0, or 3 where the idle bar is missed, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="benchmarks scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", help="device counts of the scaling table, by commas")
    parser.add_argument("--run", action="append", help="run directory: simulate its machine; several: of all together")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--svg", help="draw them into this file")
    options = parser.parse_args(argv)
    try:
        figures = of_runs([Path(run) for run in options.run]) if options.run else of_gpus(_devices(options.devices))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        draw(figures, Path(options.svg))
    return 0 if figures.get("met", True) else 3


def _devices(text: str | None) -> tuple[int, ...]:
    if text is None:
        return SCALES
    if not all(word.isdigit() and int(word) >= 2 for word in text.split(",")):
        raise ConfigError(f"--devices {text}: whole numbers from 2 on, by commas")
    return tuple(map(int, text.split(",")))


def of_gpus(scales: tuple[int, ...]) -> dict[str, Any]:
    """Scaling of asynchronous training at L = 50, then modes and L on a few machines, with advice for each."""
    print(f"assumed: {TRAIN_TOKENS_PER_SECOND:.0f} trained tokens/s per device; {GPU}\n")
    print("async, L = 50, one window carried, long tail kept across publishes\n" + HEAD)
    scaling = [cell("async", devices, 50) for devices in scales]
    modes, advice = [], []
    for devices in SMALL:
        print(f"\n{devices} device{'s' * (devices > 1)}\n{HEAD}")
        names = [mode for mode in LAGS if mode != "async" or devices > 1]
        cells = [cell(mode, devices, lag) for mode in names for lag in LAGS[mode]]
        modes += cells
        advice.append(advise(cells))
    large = [c for c in scaling if c["devices"] >= 64]
    met = all(c["training_idle"] <= TRAINING_IDLE and c["generation_idle"] <= GENERATION_IDLE for c in large)
    print(f"\nbar: training idle <= {TRAINING_IDLE:.0%}, generation idle <= {GENERATION_IDLE:.0%}: {met}")
    return {"machine": dataclasses.asdict(GPU), "scaling": scaling, "modes": modes, "advice": advice, "met": met}


HEAD = "mode        devices (gen+train)    L  training idle  generation idle  tokens/s/device  lag median/max  cleared"


def cell(mode: str, devices: int, lag: int) -> dict[str, Any]:
    """One simulated run of four windows and more."""
    engines, trainers = split(devices) if mode == "async" else (devices, devices)
    per_step = max(4, devices // 2)
    machine = dataclasses.replace(GPU, engines=engines, train_token_seconds=1 / (TRAIN_TOKENS_PER_SECOND * trainers))
    carries = mode in ("async", "phased keep")
    settings = Settings(
        generates=True,
        overlaps=MODES[mode.split()[0]].overlaps,
        steps=max(24, 4 * lag),
        groups_per_step=per_step,
        lag=lag,
        window=2 if carries else 1,
        max_groups_ahead=round(lag * per_step * (SPARE if mode == "phased keep" else 1)),
        on_publish="keep" if carries else "drain",
        evaluate=False,
        engines=engines,
    )
    begin = time.perf_counter()
    outcome = simulate(machine, settings)
    row = {
        "mode": mode,
        "devices": devices,
        "generating": engines,
        "training": trainers,
        "lag": lag,
        "training_idle": 1 - outcome.training,
        "generation_idle": 1 - outcome.generation,
        "tokens_per_second": outcome.tokens_per_second,
        "lag_median": outcome.lag_percentile(0.5),
        "lag_max": max(outcome.lags),
        "lags": dict(sorted(outcome.lags.items())),
        "cleared": outcome.cleared,
        "failures": outcome.failures,
        "simulated_seconds": outcome.seconds,
        "seconds": time.perf_counter() - begin,
    }
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    machine = f"{row['mode']:11} {row['devices']:7d} ({row['generating']}+{row['training']})"
    idle = f"{row['training_idle']:14.1%} {row['generation_idle']:16.1%}"
    speed = f"{row['tokens_per_second'] / row['devices']:16.0f}"
    lags = f"{row['lag_median']:10d}/{row['lag_max']:<4d}"
    print(f"{machine:31} {row['lag']:4d} {idle} {speed} {lags} {row['cleared']:8.2%}", flush=True)


def split(devices: int) -> tuple[int, int]:
    """Devices that generate and that train, so that both keep pace."""
    per_engine = GPU.slots / (GPU.token_seconds + GPU.crowding * GPU.slots)
    engines = round(devices * TRAIN_TOKENS_PER_SECOND / (TRAIN_TOKENS_PER_SECOND + per_engine))
    engines = min(max(1, engines), devices - 1)
    return engines, devices - engines


def advise(cells: list[dict[str, Any]]) -> str:
    """The mode and the smallest L within 2 % of the best throughput."""
    best = max(c["tokens_per_second"] for c in cells)
    good = min((c for c in cells if c["tokens_per_second"] >= 0.98 * best), key=lambda c: c["lag"])
    split = f", {good['generating']} generating and {good['training']} training" if good["mode"] == "async" else ""
    sync = next(c for c in cells if c["mode"] == "sync")["tokens_per_second"]
    mode = f'mode = "{good["mode"].split()[0]}"' + (', on_publish = "keep"' if good["mode"] != "phased" else "")
    line = (
        f"for this machine take {mode}, lag = {good['lag']}{split}: "
        f"{good['tokens_per_second']:.0f} tokens/s, {good['tokens_per_second'] / sync:.2f}x sync"
    )
    print(line)
    return line


def of_runs(runs: list[Path]) -> dict[str, Any]:
    """Modes and L on the machine of these runs, from their durations. One device: async would need another."""
    for run in runs:
        if not (run / "events.jsonl").exists():
            raise ConfigError(f"{run} holds no events.jsonl: name the directory of a run with an engine")
    recipe = load_recipe(runs[0] / "config.toml")
    records = [read_record(run / "events.jsonl") for run in runs]
    machine = fit_machine(records, recipe.schedule.group_size)
    if not machine.crowding:
        print("these runs generated in bursts of one size: give one with another L too, or trust only this L")
    per_step, steps = recipe.schedule.groups_per_step, recipe.schedule.steps
    print(f"measured: {machine}\n" + "mode       L   tokens/s   training   generation   seconds")
    cells = []
    for mode, lag in [("sync", 1), *(("phased", lag) for lag in (4, 16, 64, 200) if lag <= steps)]:
        settings = Settings(
            generates=True,
            overlaps=False,
            steps=steps,
            groups_per_step=per_step,
            lag=lag,
            window=1,
            max_groups_ahead=lag * per_step,
            evaluate=False,
        )
        outcome = simulate(machine, settings)
        shares = f"{outcome.training:10.1%} {outcome.generation:12.1%}"
        print(f"{mode:7} {lag:4d} {outcome.tokens_per_second:10.0f} {shares} {outcome.seconds:9.1f}")
        row = {"mode": mode, "lag": lag, "tokens_per_second": outcome.tokens_per_second, "seconds": outcome.seconds}
        cells.append(row)
    return {"machine": dataclasses.asdict(machine), "modes": cells, "advice": [advise(cells)]}


def draw(figures: dict[str, Any], out: Path) -> None:
    """Idle over devices; throughput over L; distribution of lag."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    scaling = figures["scaling"]
    for name in ("training", "generation"):
        left.plot([c["devices"] for c in scaling], [100 * c[f"{name}_idle"] for c in scaling], "o-", label=name)
    left.set(xscale="log", xlabel="devices", ylabel="idle, %", ylim=(0, None), title="async, L = 50")
    left.legend()
    devices = max(c["devices"] for c in figures["modes"])
    cells = [c for c in figures["modes"] if c["devices"] == devices]
    for mode in LAGS:
        own = [c for c in cells if c["mode"] == mode]
        middle.plot([c["lag"] for c in own], [c["tokens_per_second"] / devices for c in own], "o-", label=mode)
    middle.set(
        xscale="log", xlabel="L, steps", ylabel="tokens/s per device", ylim=(0, None), title=f"{devices} devices"
    )
    middle.legend()
    for c in cells:
        if c["mode"] == "async":
            total = sum(c["lags"].values())
            steps, shares = zip(*((int(k), v / total) for k, v in c["lags"].items()), strict=True)
            right.plot([s / c["lag"] for s in steps], [s * c["lag"] for s in shares], label=f"L = {c['lag']}")
    right.set(xlabel="lag / L", ylabel="density", title="lag of trained groups, async")
    right.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
