"""`oapl figure RUN FILE --kind gantt`: who worked when, from the scheduler's events; one sees what overlaps."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oapl_engine.errors import ConfigError
from oapl_engine.files import read_jsonl
from oapl_engine.report.figure import save

Span = tuple[float, float]
LANES = {
    "generate": "tab:blue",
    "verify": "tab:cyan",
    "train": "tab:orange",
    "publish": "tab:red",
    "evaluate": "tab:green",
    "checkpoint": "tab:gray",
}


def plot_gantt(run_dir: Path, out: Path) -> None:
    """Draw events.jsonl of a run into `out` (.svg, .png or .pdf). Raises ConfigError."""
    spans = work_spans([row for row in read_jsonl(run_dir / "events.jsonl") if "at" in row])
    if not any(spans.values()):
        raise ConfigError(f"{run_dir} holds no events.jsonl with work in it: name the directory of a run")
    from matplotlib.figure import Figure

    begin = min(start for lane in spans.values() for start, _ in lane)
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    for y, (name, color) in enumerate(LANES.items()):
        bars = [(start - begin, end - start) for start, end in spans[name]]
        axes.broken_barh(bars, (-y - 0.4, 0.8), color=color, linewidth=0)
    axes.set_yticks([-y for y in range(len(LANES))], list(LANES))
    axes.set_xlabel("seconds")
    axes.set_title(run_dir.name)
    save(figure, out)


def work_spans(rows: list[dict[str, Any]]) -> dict[str, list[Span]]:
    """Lane to [start, end) in seconds since the epoch, in order, without overlaps.

    A command lasts until the scheduler's next word; generation while a group is in flight.
    """
    spans: dict[str, list[Span]] = {name: [] for name in LANES}
    for row, after in itertools.pairwise(rows):
        lane = row["name"].lower()
        killed = after["name"] == "EngineReady"  # the next word is another process's, after a resume
        if row["kind"] == "command" and lane in spans and not killed:
            spans[lane].append((row["at"], after["at"]))
        if row["name"] == "GroupDone":
            done = row.get("done_at") or row["at"]
            spans["verify"].append((done - row.get("verify_seconds", 0.0), done))
    spans["generate"] = list(_in_flight(rows))
    return {name: merged(lane) for name, lane in spans.items()}


def _in_flight(rows: list[dict[str, Any]]) -> Iterable[Span]:
    begin, groups, last = 0.0, 0, 0.0
    for row in rows:
        if row["name"] == "Submit":
            begin = begin if groups else row["at"]
            groups += row["n"]
        elif row["name"] in ("GroupDone", "GroupInvalid") and groups:
            groups -= 1
            last = max(last, (row.get("done_at") or row["at"]) - row.get("verify_seconds", 0.0))
            if not groups:
                yield begin, max(begin, last)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time, with spans that touch joined."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
