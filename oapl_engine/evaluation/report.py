"""What `oapl eval` prints and draws: a table, paired differences to the first model, pass@k over k."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from oapl_engine.evaluation.compare import evaluate_targets, evaluation_recipe, find_target, name_apart
from oapl_engine.evaluation.evaluate import compare
from oapl_engine.report.figure import pass_at_k_table, plot_pass_at_k


def evaluate_and_report(
    models: Sequence[str], task: str, n: int, ks: Sequence[int], out: str, overrides: list[str]
) -> None:
    """Table and paired differences on stdout, progress on stderr, `pass_at_k.svg` next to the counts. ConfigError."""
    targets = name_apart([find_target(path) for path in models], models)
    recipe = evaluation_recipe(models, targets, task, n, ks, overrides)
    name = task.replace(":", "-") or recipe.data.task or Path(recipe.data.path).stem or recipe.data.source
    folder = Path(out or f"runs/eval-{Path(name).stem}")
    results = evaluate_targets(
        targets, recipe, bool(task), folder, lambda text: print(text, file=sys.stderr, flush=True)
    )
    first = results[0]
    curves = {}
    paired = {}
    for target, result in zip(targets, results, strict=True):
        curves[target.label] = [(k, *result.pass_at_k(k)) for k in ks]
        if result is not first:
            paired[target.label] = [(k, *compare(first, result, k)) for k in ks]
    title = f"{first.task}: {len(first.problems)} problems x {n} samples, temperature {first.temperature:g}"
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as table:
        console.print(pass_at_k_table(curves, paired, title))
    print(table.get(), end="")  # Console's own printing ends the program where the reader of a pipe has gone
    plot_pass_at_k(curves, title, folder / "pass_at_k.svg")
    for target, result in zip(targets, results, strict=True):
        print(f"{target.label}: pass@1 {result.describe()}")
    print(f"done: models={len(results)} problems={len(first.problems)} n={n} out={folder}")
