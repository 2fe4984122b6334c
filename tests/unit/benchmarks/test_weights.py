"""`python -m benchmarks weights` measures what it says, on a model small enough to say it quickly."""

import json
import subprocess
import sys

import pytest

from benchmarks import weights
from tests.conftest import ROOT


def test_the_page_shows_the_data(capsys):
    assert weights.main(["--show", str(ROOT / "benchmarks" / "data" / "weights.json")]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown in (ROOT / "docs" / "weights.md").read_text()
    assert len(shown.splitlines()) > 20


@pytest.mark.live
@pytest.mark.slow
def test_every_transport_and_every_rival_is_measured(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("{}")
    command = [sys.executable, "-m", "benchmarks", "weights", "--models", "micro", "--rounds", "1", "--json", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    figures = json.loads(path.read_text())
    row = figures["micro"]
    assert set(row["transports"]) == {"memfd", "file", "gloo", "memfd, in turn"}
    for seconds in row["transports"].values():
        parts = sum(seconds[p] for p in ("take", "check", "scatter", "read_back"))
        assert 0 < parts <= seconds["transfer"] < seconds["total"]
        assert 0 < seconds["changed_share"] < 1
    assert row["bucket_bytes"] <= row["bytes"]
    assert set(row["vllm"]) == {"reload from disk", "layerwise from memory"}
    assert "predicted, not measured" in done.stdout
    assert figures["predicted"]["label"] == "predicted, not measured"
