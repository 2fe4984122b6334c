"""`make demo`, short: three objectives train at once, their curves are drawn, and what they ended at is said."""

import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.demo import SHOWN, terminal_plot
from tests.conftest import ROOT


def test_curves_can_be_told_apart_with_and_without_color():
    found = {name: np.linspace(0, 0.1 * i, 9) for i, name in enumerate(SHOWN)}
    plain, colored = terminal_plot(found, 10, False), terminal_plot(found, 10, True)
    assert "\x1b" not in plain
    for i, (name, (_, mark)) in enumerate(SHOWN.items()):
        assert f"{mark}{mark} {name} {0.1 * i:.3f}" in plain
    assert len(set(re.findall(r"\x1b\[38;5;(\d+)m⢕⢕", colored))) == len(SHOWN)


@pytest.mark.live
def test_the_demo_runs_to_its_end(tmp_path):
    command = [sys.executable, "-m", "experiments.demo", "--runs", tmp_path, "--steps", "4", "--lag", "2"]
    done = subprocess.run([*command, "--held-out", "4"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("done: picture=")
    assert (tmp_path / "demo.svg").read_text().startswith("<?xml")
    for name in SHOWN:
        assert any(line.startswith(name) and "held-out pass@1" in line for line in done.stdout.splitlines())
