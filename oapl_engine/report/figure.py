"""Pictures: what a run did (`oapl figure RUN FILE`), and pass@k of several models (`oapl eval`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from oapl_engine.errors import ConfigError
from oapl_engine.report.metrics import read_evaluations, read_metrics

Curve = Sequence[tuple[int, float, float]]  # (k, pass@k, standard error)
REWARD_COLUMNS = ("reward_mean", "reward_error")
SMOOTH = 8  # steps in the running mean of the reward


def plot_run(run_dir: Path, out: Path) -> None:
    """Reward and held-out pass@1, lag and distance from the engine, from metrics.jsonl and eval.jsonl of a run.

    out: .svg, .png or .pdf. Raises ConfigError.
    """
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise ConfigError(f"{run_dir} holds no metrics.jsonl with a step in it: name the directory of a run")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    steps = [row["step"] for row in rows]
    _reward(top, steps, rows, run_dir)
    middle.step(steps, [row["off_policy/mean"] for row in rows], where="mid", color="tab:gray")
    middle.set_ylabel("lag, steps")
    bottom.plot(steps, [_number(row["log_ratio/std"]) for row in rows], color="tab:red")
    bottom.set_ylabel("std ln π/π_vllm")
    bottom.set_xlabel("optimizer step")
    figure.suptitle(run_dir.name)
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """Write a matplotlib figure; the same figure gives the same SVG. Raises ConfigError for an unknown ending, and
    where nothing can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except ValueError as error:
        raise ConfigError(f"{out}: {error}; name a file that ends in .svg, .png or .pdf") from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; name a file in a folder of yours") from error


def _reward(axes: Any, steps: list[int], rows: list[dict[str, Any]], run_dir: Path) -> None:
    reward = np.array([_number(row["reward/all/mean"]) for row in rows])
    mean = [np.nanmean(reward[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(reward))]
    axes.plot(steps, reward, color="tab:blue", alpha=0.25)
    axes.plot(steps, mean, color="tab:blue", label=f"training reward, mean of {SMOOTH} steps")
    held_out = read_evaluations(run_dir)
    if held_out:
        values, errors = ([_number(row[key]) for row in held_out.values()] for key in ("pass_at_k", "standard_error"))
        axes.errorbar(list(held_out), values, errors, fmt="o", color="black", label="held-out pass@1")
        rewards, spreads = ([_number(row.get(key)) for row in held_out.values()] for key in REWARD_COLUMNS)
        if not np.allclose(rewards, values, equal_nan=True) and np.isfinite(rewards).any():
            axes.errorbar(list(held_out), rewards, spreads, fmt="s", color="tab:green", label="held-out reward")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(1, high))
    axes.legend()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def pass_at_k_table(curves: Mapping[str, Curve], against_first: Mapping[str, Curve], title: str) -> Table:
    """A row a model: pass@k ± standard error; below it the paired difference to the first model."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for k, _, _ in next(iter(curves.values())):
        table.add_column(f"pass@{k}", justify="right")
    first = next(iter(curves))
    for label, curve in curves.items():
        table.add_row(label, *(f"{value:.4f} ± {error:.4f}" for _, value, error in curve))
        if label in against_first:
            table.add_row(f"  − {first}", *(f"{value:+.4f} ± {error:.4f}" for _, value, error in against_first[label]))
    return table


def plot_pass_at_k(curves: Mapping[str, Curve], title: str, out: Path) -> None:
    """Draw pass@k over k with one standard error either side into `out` (.svg, .png or .pdf). Raises ConfigError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        k, value, error = zip(*curve, strict=True)
        (line,) = axes.plot(k, value, marker=".", label=label)
        low, high = ([v + sign * e for v, e in zip(value, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(k, low, high, color=line.get_color(), alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k")
    axes.set_ylabel("pass@k")
    axes.set_title(title)
    axes.legend()
    save(figure, out)
