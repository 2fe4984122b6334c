"""The examples of docs/scheduler.md run, and it names only what there is."""

import json
import re

from oapl_engine.cli import _parser
from oapl_engine.scheduler import events
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "scheduler.md").read_text()


def test_the_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for block in blocks:
        exec(compile(block, "scheduler.md", "exec"), names)
    assert len(blocks) == 3
    assert names["outcome"].seconds > 0


def test_what_it_names_exists():
    for path in re.findall(r"\]\(\.\./(\S+?)\)", TEXT):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([A-Z]\w+)\(", TEXT):
        assert hasattr(events, name), name
    for name in re.findall(r"python -m benchmarks (\w+)", TEXT):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name
    for line in re.findall(r"`oapl (figure [^`]+)`", TEXT):
        assert _parser().parse_args(line.split()).kind == "gantt"


def test_its_figures_are_the_committed_ones():
    micro, smollm2 = (
        json.loads((ROOT / "benchmarks" / "data" / f"modes_{m}.json").read_text()) for m in ("micro", "smollm2")
    )
    assert f"micro {micro['phased_over_sync']:.2f}x, SmolLM2 {smollm2['phased_over_sync']:.2f}x" in TEXT
    assert f"against phased on both: {micro['async_over_phased']:.2f}x" in TEXT
    for run in (*micro["runs"].values(), *smollm2["runs"].values()):
        assert f"| {run['seconds']:.1f} | {run['tokens_per_second']:.0f} |" in TEXT
    for picture in re.findall(r"\]\((figures/\S+)\)", TEXT):
        assert (ROOT / "docs" / picture).exists()
