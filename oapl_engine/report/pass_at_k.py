"""pass@k of several models as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from oapl_engine.report.figure import save

Curve = Sequence[tuple[int, float, float]]  # (k, pass@k, standard error)


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
