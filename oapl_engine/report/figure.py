"""`oapl figure RUN FILE`: what a run did, as a picture: reward and held-out pass@1, lag, distance from the engine."""

from pathlib import Path
from typing import Any

import numpy as np

from oapl_engine.config import ConfigError
from oapl_engine.report.metrics import read_evaluations, read_metrics

SMOOTH = 8  # steps in the running mean of the reward


def plot_run(run_dir: Path, out: Path) -> None:
    """Draw metrics.jsonl and eval.jsonl of a run into `out` (.svg, .png or .pdf). Raises ConfigError."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise ConfigError(f"{run_dir} holds no metrics.jsonl with a step in it: name the directory of a run")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    steps = [row["step"] for row in rows]
    _reward(top, steps, rows, run_dir)
    middle.step(steps, [row["lag_mean"] for row in rows], where="mid", color="tab:gray")
    middle.set_ylabel("lag, steps")
    bottom.plot(steps, [_number(row["log_ratio_std"]) for row in rows], color="tab:red")
    bottom.set_ylabel("std ln π/π_vllm")
    bottom.set_xlabel("optimizer step")
    figure.suptitle(run_dir.name)
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """Write a matplotlib figure; the same figure gives the same SVG. Raises ConfigError for an unknown ending."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except ValueError as error:
        raise ConfigError(f"{out}: {error}; name a file that ends in .svg, .png or .pdf") from error


def _reward(axes: Any, steps: list[int], rows: list[dict[str, Any]], run_dir: Path) -> None:
    reward = np.array([_number(row["reward_mean"]) for row in rows])
    mean = [np.nanmean(reward[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(reward))]
    axes.plot(steps, reward, color="tab:blue", alpha=0.25)
    axes.plot(steps, mean, color="tab:blue", label=f"training reward, mean of {SMOOTH} steps")
    held_out = read_evaluations(run_dir)
    if held_out:
        values, errors = ([_number(row[key]) for row in held_out.values()] for key in ("pass_at_k", "standard_error"))
        axes.errorbar(list(held_out), values, errors, fmt="o", color="black", label="held-out pass@1")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
