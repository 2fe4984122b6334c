"""`make demo`: three objectives side by side at L = 200, each with a live engine; curves in the terminal as they train.

OAPL, GRPO with the clipped ratio π/π_vllm and GRPO without correction teach the micro model to sort 9 digits. The
settings are those that the lag map's tuning chose at L = 200 (docs/results.md); one seed, so an illustration, no proof.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.cells import ROOT, as_overrides, read_rows
from experiments.lag_map import DATA, RECIPE, SETTINGS, best_setting
from oapl_engine.errors import DIFFERENCE, OK, guarded
from oapl_engine.report.metrics import read_evaluations, read_metrics

SHOWN = {"OAPL": ("green", "o"), "GRPO-clip": ("blue", "x"), "GRPO uncorrected": ("red", ".")}  # with color, without
LAG, STEPS = 200, 400
SMOOTH = 20  # steps in the running mean
PLAIN_SECONDS = 10.0

Curves = dict[str, np.ndarray]


def start(runs: Path, steps: int, lag: int, held_out: int) -> dict[str, subprocess.Popen[bytes]]:
    """One `oapl train` an objective; their output goes to RUNS/NAME.log."""
    _make_model()
    rows, started = read_rows(DATA), {}
    for name in SHOWN:
        folder = runs / name.replace(" ", "_")
        settings = SETTINGS[name][best_setting(rows, name, LAG)] | {
            "schedule.lag": lag, "schedule.steps": steps, "checkpoint.every": steps,
            "evaluation.n": 4, "evaluation.k": [1], "data.held_out": held_out,
        }  # fmt: skip
        command = [sys.executable, "-m", "oapl_engine.cli", "train", RECIPE, "--run.dir", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(_log(runs, name), "wb") as log:
            started[name] = subprocess.Popen(
                [*command, *as_overrides(settings)],
                cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    return started


def _make_model() -> None:
    """Once, not by three runs at a time."""
    if not (ROOT / "models" / "micro_sort9").exists():
        subprocess.run(
            [sys.executable, "-m", "oapl_engine.cli", "sft", "recipes/micro_sft_sort9.toml"], cwd=ROOT, check=True
        )


def curves(runs: Path) -> Curves:
    """Running mean of the training reward by objective."""
    found = {}
    for name in SHOWN:
        rows = read_metrics(runs / name.replace(" ", "_") / "metrics.jsonl")
        reward = np.array([row["reward/all/mean"] for row in rows])
        found[name] = np.array([reward[max(0, i - SMOOTH + 1) : i + 1].mean() for i in range(len(reward))])
    return found


def terminal_plot(found: Mapping[str, np.ndarray], steps: int, color: bool, width: int = 100, height: int = 22) -> str:
    """The curves as text."""
    import plotext

    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.theme("clear")
    for name, curve in found.items():
        if len(curve):
            hue, mark = SHOWN[name]
            label, marker = f"{name} {curve[-1]:.3f}", "braille" if color else mark
            plotext.plot(list(range(1, len(curve) + 1)), curve.tolist(), label=label, marker=marker, color=hue)
    plotext.xlim(0, steps)
    plotext.title(f"training reward, mean of {SMOOTH} steps")
    text = str(plotext.build())
    return text if color else str(plotext.uncolorize(text))


def watch(runs: Path, started: Mapping[str, subprocess.Popen[bytes]], steps: int) -> None:
    """Redraw until all have ended; plain lines where stdout is no terminal. SystemExit(1) where one failed."""
    live, last = sys.stdout.isatty(), 0.0
    while any(process.poll() is None for process in started.values()):
        found = curves(runs)
        states = [f"{name}: step {len(c)}/{steps}, {_doing(runs, name)}" for name, c in found.items()]
        if live:
            print(f"\x1b[H\x1b[2J{terminal_plot(found, steps, True)}", *states, sep="\n", flush=True)
        elif time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            print(*states, sep="   ", flush=True)
        time.sleep(1.0)
    for name, process in started.items():
        if process.returncode not in (OK, DIFFERENCE):  # one that learned nothing is shown too
            said = _log(runs, name).read_text(encoding="utf-8", errors="replace")
            sys.exit(f"error: {name} ended with {process.returncode}:\n{said[-800:]}")


def _log(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_") / "demo.log"


def _doing(runs: Path, name: str) -> str:
    """The last thing that a run said."""
    said = _log(runs, name).read_text(encoding="utf-8").splitlines()
    return said[-1][:60] if said else "starting"


def picture(found: Mapping[str, np.ndarray], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in found.items():
        axes.plot(range(1, len(curve) + 1), curve, label=name, color=f"tab:{SHOWN[name][0]}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training reward, mean of {SMOOTH} steps")
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lag", type=int, default=LAG)
    parser.add_argument("--held-out", type=int, default=256, help="problems of the evaluation")
    arguments = parser.parse_args(argv)
    begun, runs = time.monotonic(), arguments.runs
    started = start(runs, arguments.steps, arguments.lag, arguments.held_out)
    try:
        watch(runs, started, arguments.steps)
    except KeyboardInterrupt:
        return 130
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    found = curves(runs)
    picture(found, runs / "demo.svg")
    print(terminal_plot(found, arguments.steps, sys.stdout.isatty()))
    for name in SHOWN:
        rows = read_evaluations(runs / name.replace(" ", "_"))
        before, after = rows[0], rows[max(rows)]
        change = f"{before['pass_at_k']:.3f} → {after['pass_at_k']:.3f} ± {after['standard_error']:.3f}"
        print(f"{name:18} held-out pass@1 {change}")
    print(f"done: picture={runs / 'demo.svg'} seconds={time.monotonic() - begun:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
