"""Writes the generated parts of docs/ and README.md, from code and committed figures. It measures nothing.

    python -m benchmarks docs [--check]

A part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; PARTS says which function writes it.
docs/configuration.md is generated completely; the tables of docs/results.md are those of experiments/lag_map_report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _figures

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "data"
PART = re.compile(r"<!-- generated: (\S+) -->\n(.*?)<!-- end: \1 -->", re.S)


def main(argv: list[str]) -> int:
    """Write the pages that have changed; 0. With --check write nothing; 3 where a page is not up to date."""
    parser = argparse.ArgumentParser(prog="benchmarks docs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that are not up to date")
    check = parser.parse_args(argv).check
    stale = [path for path in pages() if generate(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not up to date: make docs' if check else 'written'}")
        if not check:
            path.write_text(generate(path), encoding="utf-8")
    return 3 if check and stale else 0


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def generate(path: Path) -> str:
    """The text of a page with its generated parts written anew. Raises KeyError for a part that is not in PARTS."""
    if path.name in COMPLETE:
        return COMPLETE[path.name](path.read_text(encoding="utf-8"))
    return PART.sub(lambda part: _marked(part[1], PARTS[part[1]]()), path.read_text(encoding="utf-8"))


def _marked(name: str, text: str) -> str:
    return f"<!-- generated: {name} -->\n{text.strip()}\n<!-- end: {name} -->"


def configuration(_: str) -> str:
    """docs/configuration.md."""
    from oapl_engine.cli import configuration_page

    return configuration_page()


def results(page: str) -> str:
    """docs/results.md with the tables of the lag map."""
    from experiments import lag_map_report

    return lag_map_report.with_tables(page, lag_map_report.report(lag_map_report.read_rows(lag_map_report.DATA)))


def layers() -> str:
    """Layers of the import contract, top first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = [layer.replace("oapl_engine.", "") for layer in found]
    return "\n".join(["```", *rows, "```"])


def metrics() -> str:
    """Every metric with its meaning."""
    from oapl_engine.report.metrics import METRICS

    return table(["metric", "meaning and unit"], [[f"`{name}`", meaning] for name, meaning in METRICS.items()])


def renamed_metrics() -> str:
    """Names of version 0.1 and of this one."""
    from oapl_engine.report.metrics import RENAMED

    return table(["0.1", "0.2"], [[f"`{old}`", f"`{new}`"] for old, new in RENAMED.items()])


def objectives() -> str:
    """What each objective is and declares."""
    import inspect

    from oapl_kernels.objectives import OBJECTIVES

    rows = []
    for name, factory in OBJECTIVES.items():
        parameters = inspect.signature(factory).parameters
        made = factory(**{p: 1e-3 for p in parameters if parameters[p].default is inspect.Parameter.empty})
        needs = ", ".join(f"`{need}`" for need in made.needs) or "-"
        summary = (sys.modules[factory.__module__].__doc__ or "").partition("\n")[0].rstrip(".")
        rows.append([f"`{name}`", summary, made.scope, made.baseline, made.normalizer, needs])
    return table(["name", "source", "scope", "baseline", "normalizer", "needs"], rows)


def kernels() -> str:
    """What `python -m benchmarks kernels --show` prints."""
    from benchmarks.kernels import show_all

    return fenced(printed(show_all, read("kernels")))


def weights() -> str:
    """What `python -m benchmarks weights --show` prints: Markdown."""
    from benchmarks.weights import show

    return printed(show, read("weights"))


def modes() -> str:
    """Both models' runs of `python -m benchmarks modes`."""
    rows = []
    for model, title in (("micro", "micro"), ("smollm2", "SmolLM2-135M")):
        for name, run in read(f"modes_{model}")["runs"].items():
            own = run["simulated"].get(name)
            speed = f"{run['tokens_per_second']:.0f}"
            rows.append([f"{title}, {name}", f"{run['seconds']:.1f}", speed, "-" if own is None else f"{own:.2f}"])
    return table(["run", "seconds", "trained tokens per second", "simulated from its own durations / measured"], rows)


def modes_read() -> str:
    """What the runs of `python -m benchmarks modes` say: their speeds, and how well the simulator predicts them."""
    micro, smollm2 = read("modes_micro"), read("modes_smollm2")

    def predicted(run: str, *records: str) -> str:
        found = micro["runs"][run]["simulated"]
        return ", ".join(f"{found[record]:.2f} from `{record}`" for record in records)

    speedup, share = (
        f"micro {micro[key]:.2f}, SmolLM2 {smollm2[key]:.2f}" for key in ("phased_over_sync", "share_of_bound")
    )
    return "\n".join(
        [
            f"- Speed of phased against sync: {speedup}. As a share of what phased would reach if only its own phases",
            f"  (generate, train, publish, attest) took time: {share}.",
            f"- Speed of async on disjoint cores against phased on both: {micro['async_over_phased']:.2f}.",
            "- Seconds predicted by the simulator from the record of another run, divided by the measured ones, micro:",
            f"  `async` {predicted('async', 'phased', 'phased, one core', 'sync and phased')};",
            f"  `phased` {predicted('phased', 'phased, one core', 'sync', 'sync and phased')};",
            f"  `sync` {predicted('sync', 'phased', 'sync and phased')}.",
        ]
    )


def architectures() -> str:
    """What becomes of each tiny model of `python -m benchmarks architectures`."""
    found = read("architectures")["findings"]

    def row(what: str, names: list[str]) -> list[str]:
        nats, gradient = (
            f"{max(values):.0e}" if (values := [found[n][key] for n in names if found[n][key] is not None]) else "-"
            for key in ("nats", "gradient")
        )
        return [what, str(len(names)), nats, gradient, ", ".join(f"`{name}`" for name in sorted(names))]

    def named(*modes: str) -> list[str]:
        return [name for name, finding in found.items() if finding["mode"] in modes]

    rows = [row("prompts shared", named("share")), row("packed, prompts not shared", named("pack"))]
    rows += [row("one by one", named("one by one")), row("refused", named("refused"))]
    head = ["what the trainer does", "models", "log-probs, nats", "gradients, relative", "which"]
    return table(head, [cells for cells in rows if cells[1] != "0"])


def all_figures() -> str:
    """Every figure that committed data gives, with its command."""
    return table(["what", "figure", "command"], [[f.what, f.figure(), f.command] for f in _figures.FIGURES])


def headline() -> str:
    """The figures of the README."""
    return table(["what", "figure"], [[f.what, f.figure()] for f in _figures.FIGURES if f.headline])


def read(name: str) -> Any:
    """A file of benchmarks/data."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def printed(show: Callable[[Any], object], figures: Any) -> str:
    """What a function prints, without blanks at the ends of lines."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(figures)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    first, *others = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [head, *rows])
    return "\n".join([first, "|---" * len(head) + "|", *others])


COMPLETE = {"configuration.md": configuration, "results.md": results}
PARTS = {
    "layers": layers,
    "metrics": metrics,
    "renamed-metrics": renamed_metrics,
    "objectives": objectives,
    "kernels": kernels,
    "weights": weights,
    "modes": modes,
    "modes-read": modes_read,
    "architectures": architectures,
    "figures": all_figures,
    "headline": headline,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
