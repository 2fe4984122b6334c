"""Tables and pictures of the lag map: `python -m experiments.lag_map_report` writes docs/results.md and docs/figures/.

Intervals are one standard error over seeds; where there is one seed, over problems. Values are the last, not the best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import CURVE, ROOT, read_rows
from experiments.lag_map import DATA, HELD_OUT, LAGS, SETTINGS, TUNED_AT, tuning_score
from oapl_engine.errors import guarded
from oapl_engine.evaluation.pass_at_k import mean_and_error, pass_at_k_each

PAGE = ROOT / "docs" / "results.md"
BOOTSTRAPS = 2000
BEGIN, END = "<!-- written by experiments/lag_map_report.py -->", "<!-- until here -->"

Row = dict[str, Any]


def select(rows: Iterable[Row], **tags: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in tags.items())]


def final(row: Row, k: int = 1) -> float:
    """pass@k of the last evaluation on the map's problems."""
    last = row["evaluations"][-1]
    return mean_and_error(pass_at_k_each(last["n"], last["correct"][:HELD_OUT], k))[0]


def interval(rows: Sequence[Row], value: Callable[[Row], float] = final) -> tuple[float, float]:
    """Mean over seeds and its standard error; nan where there is nothing."""
    if not rows:
        return math.nan, math.nan
    if len(rows) == 1:
        last = rows[0]["evaluations"][-1]
        return value(rows[0]), mean_and_error(pass_at_k_each(last["n"], last["correct"][:HELD_OUT], 1))[1]
    return mean_and_error([value(row) for row in rows])


def shown(rows: Sequence[Row], value: Callable[[Row], float] = final) -> str:
    mean, error = interval(rows, value)
    return "–" if math.isnan(mean) else f"{mean:.3f} ± {error:.3f} ({len(rows)})"


def tuning_table(rows: dict[str, Row]) -> list[str]:
    """Every setting that was tried, and what it scored on the tuning problems."""
    lines = ["| objective | L | settings tried: final pass@1 (best in bold) |", "|---|---|---|"]
    for objective, choices in SETTINGS.items():
        for lag in TUNED_AT:
            found = {
                r["setting"]: tuning_score(r) for r in select(rows.values(), kind="tune", objective=objective, lag=lag)
            }
            best = max(found, key=lambda i: found[i], default=None)
            cells = []
            for index, settings in enumerate(choices):
                what = ", ".join(
                    f"{name.rpartition('.')[2]} {value}" for name, value in settings.items() if "name" not in name
                )
                score = f"{found[index]:.3f}" if index in found else "–"
                cells.append(f"{what}: {f'**{score}**' if index == best else score}")
            lines.append(f"| {objective} | {lag} | {'; '.join(cells)} |")
    return lines


def map_table(rows: dict[str, Row], k: int = 1) -> list[str]:
    """Final pass@k by objective and lag: mean ± standard error over seeds (number of seeds)."""
    lines = [f"| final pass@{k} | " + " | ".join(f"L={lag}" for lag in LAGS) + " |", "|---" * (len(LAGS) + 1) + "|"]
    for objective in SETTINGS:
        found = [select(rows.values(), kind="map", objective=objective, lag=lag) for lag in LAGS]
        lines.append(f"| {objective} | " + " | ".join(shown(f, lambda row: final(row, k)) for f in found) + " |")
    return lines


def variant_table(rows: dict[str, Row]) -> list[str]:
    """OAPL and the strongest other with one thing changed."""
    lags = (1, 64, 200)
    lines = [f"| final pass@1 | {' | '.join(f'L={lag}' for lag in lags)} |", "|---|---|---|---|"]
    kinds = sorted({r["kind"] for r in rows.values() if r["kind"].startswith("variant/")})
    for objective, kind in itertools.product(("OAPL", "GRPO-clip"), ("map", *kinds)):
        found = [select(rows.values(), kind=kind, objective=objective, lag=lag) for lag in lags]
        if any(found):
            name = kind.removeprefix("variant/").replace("map", "as tuned")
            lines.append(f"| {objective}, {name} | {' | '.join(map(shown, found))} |")
    return lines


def crossover(rows: dict[str, Row]) -> list[str]:
    """OAPL against the best other objective and GRPO-clip at each lag, and the lag where it overtakes GRPO-clip."""
    lines = []
    for lag in LAGS:
        ours = select(rows.values(), kind="map", objective="OAPL", lag=lag)
        others = {o: select(rows.values(), kind="map", objective=o, lag=lag) for o in SETTINGS if o != "OAPL"}
        others = {o: found for o, found in others.items() if found}
        if not ours or not others:
            continue
        best = max(others, key=lambda o: interval(others[o])[0])
        parts = [f"− {best} (the best other) {_difference(ours, others[best])}"]
        if best != "GRPO-clip" in others:
            parts.append(f"− GRPO-clip {_difference(ours, others['GRPO-clip'])}")
        lines.append(f"- L={lag}: OAPL {', '.join(parts)}")
    crossings = overtakes(rows)
    if crossings:
        low, middle, high = np.quantile(crossings, [0.05, 0.5, 0.95])
        lines.append(
            f"- OAPL overtakes GRPO-clip at L = {middle:.0f} (90 % of {BOOTSTRAPS} bootstraps over seeds: {low:.0f} to "
            f"{high:.0f}; in {1 - len(crossings) / BOOTSTRAPS:.0%} it never does)"
        )
    return lines


def _difference(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    (a, da), (b, db) = interval(ours), interval(theirs)
    return f"= {a - b:+.3f} ± {math.hypot(da, db):.3f}"


def overtakes(rows: dict[str, Row]) -> list[float]:
    """The lag above which OAPL stays ahead of GRPO-clip, by bootstrap over seeds: straight lines between the map's lags
    on a logarithmic scale. No entry where GRPO-clip is ahead at the longest lag; L = 1 where OAPL always is."""
    found = [
        [[final(r) for r in select(rows.values(), kind="map", objective=o, lag=lag)] for lag in LAGS]
        for o in ("OAPL", "GRPO-clip")
    ]
    if not all(values for lags in found for values in lags):
        return []
    draw_from, crossings = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):
        ours, theirs = ([np.mean(draw_from.choice(values, len(values))) for values in lags] for lags in found)
        ahead = np.subtract(ours, theirs)
        behind = np.flatnonzero(ahead <= 0)
        if len(behind) == 0:
            crossings.append(float(LAGS[0]))
        elif (i := behind[-1]) < len(LAGS) - 1:
            share = -ahead[i] / (ahead[i + 1] - ahead[i])
            crossings.append(math.exp(math.log(LAGS[i]) * (1 - share) + math.log(LAGS[i + 1]) * share))
    return crossings


def draw(rows: dict[str, Row], folder: Path) -> list[Path]:
    """The pictures; returns their paths."""
    return [_lag_map(rows, folder), _bars(rows, folder), _curves(rows, folder), _generations(rows, folder)]


def _figure(width: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def _lag_map(rows: dict[str, Row], folder: Path) -> Path:
    figure, (axes,) = _figure(6, 1)
    for objective in SETTINGS:
        points = [(lag, *interval(select(rows.values(), kind="map", objective=objective, lag=lag))) for lag in LAGS]
        shorter, twice = points[:-1], points[-1:]  # L = 400 trains for 800 steps, the others for 400: no line between
        line = axes.errorbar(*zip(*shorter, strict=True), marker="o", capsize=3, label=objective).lines[0]
        axes.errorbar(*zip(*twice, strict=True), marker="D", capsize=3, color=line.get_color())
    start = [r["evaluations"][0]["pass_at_k"]["1"] for r in rows.values() if r["kind"] == "map"]
    if start:
        axes.axhline(float(np.mean(start)), color="gray", linestyle=":", label="before training")
    axes.set_xscale("log")
    axes.set_xticks(LAGS, [str(lag) for lag in LAGS])
    axes.set_xlabel("L, optimizer steps between publishes (diamonds: 800 steps in all, else 400)")
    axes.set_ylabel("final held-out pass@1")
    axes.legend()
    return _save(figure, folder / "lag_map.svg")


def _bars(rows: dict[str, Row], folder: Path) -> Path:
    figure, panels = _figure(9, 3)
    for axes, k in zip(panels, (1, 5, 10), strict=True):
        for i, objective in enumerate(SETTINGS):
            found = select(rows.values(), kind="map", objective=objective, lag=64)
            mean, error = interval(found, lambda row, k=k: final(row, k))
            axes.bar(i, mean, yerr=error, capsize=3)
        axes.set_xticks(range(len(SETTINGS)), SETTINGS, rotation=40, ha="right")
        axes.set_title(f"pass@{k} at L=64")
    return _save(figure, folder / "lag_map_bars.svg")


def _curves(rows: dict[str, Row], folder: Path) -> Path:
    figure, panels = _figure(10, 2)
    for axes, name, label in zip(panels, ("reward_mean", "entropy"), ("training reward", "entropy, nats"), strict=True):
        for objective in SETTINGS:
            found = select(rows.values(), kind="map", objective=objective, lag=200)
            if found:
                curves = np.array([[np.nan if v is None else v for v in row["curves"][name]] for row in found])
                axes.plot(CURVE * (0.5 + np.arange(curves.shape[1])), np.nanmean(curves, 0), label=objective)
        axes.set_xlabel("optimizer step, L=200")
        axes.set_ylabel(label)
    if panels[0].lines:
        panels[0].legend()
    return _save(figure, folder / "lag_map_curves.svg")


def _generations(rows: dict[str, Row], folder: Path) -> Path:
    """Accuracy of each published policy over the tokens that were generated to make it; stars: the final one, on the
    held-out problems."""
    figure, (axes,) = _figure(7, 1)
    shown = [
        ("GRPO-clip", 1, "map", "GRPO-clip, online (L=1)"),
        ("OAPL", 64, "map", "OAPL, L=64"),
        ("OAPL", 400, "map", "OAPL, two offline rounds (L=400)"),
        ("OAPL", 64, "variant/4 epochs a window", "OAPL, L=64, 4 epochs a window"),
        ("GRPO-clip", 64, "variant/4 epochs a window", "GRPO-clip, L=64, 4 epochs a window"),
    ]
    for objective, lag, kind, label in shown:
        found = select(rows.values(), kind=kind, objective=objective, lag=lag)
        if not found:
            continue
        tokens, reward = (
            np.mean([[math.nan if v is None else v for v in row["curves"][name]] for row in found], 0)
            for name in ("tokens_generated", "reward_mean")
        )
        ends = np.arange(0, len(tokens), max(1, lag / CURVE)).astype(int)  # windows begin here, and a policy with them
        made_of = np.concatenate([[0.0], tokens[ends[1:] - 1], tokens[-1:]])
        accuracy = [float(np.mean(part)) for part in np.split(reward, ends[1:])]
        (line,) = axes.plot(made_of, [*accuracy, interval(found)[0]], marker=".", label=label)
        axes.plot(made_of[-1], interval(found)[0], marker="*", markersize=12, color=line.get_color())
    axes.set_xlabel("tokens generated for training before this policy")
    axes.set_ylabel("its pass@1 (star: held-out problems)")
    if axes.lines:
        axes.legend()
    return _save(figure, folder / "lag_map_generations.svg")


def report(rows: dict[str, Row]) -> str:
    """All tables as Markdown, and how much of the study they rest on."""
    done = {kind: sum(row["kind"].startswith(kind) for row in rows.values()) for kind in ("tune", "map", "variant")}
    state = f"Runs so far: {done['tune']} of tuning, {done['map']} of the map, {done['variant']} of the variants."
    parts = [("Tuning", tuning_table(rows)), ("Map", map_table(rows)), ("pass@10", map_table(rows, 10))]
    parts += [("OAPL against the best other", crossover(rows)), ("Variants", variant_table(rows))]
    return "\n\n".join([state, *("\n".join([f"### {title}", "", *lines]) for title, lines in parts if lines)])


def with_tables(page: str, tables: str) -> str:
    """The page with what stands between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.lag_map_report")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.data)
    if not rows:
        print(f"error: {arguments.data} holds no finished cell: python -m experiments.lag_map all", file=sys.stderr)
        return 2
    arguments.page.write_text(with_tables(arguments.page.read_text(encoding="utf-8"), report(rows)), encoding="utf-8")
    for path in draw(rows, arguments.figures):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
