"""Every command that the README shows is one that works."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith(("oapl ", "torchrun ", "make ", "python -m "))]
SMALL = {
    "schedule.mode": "sync",
    "schedule.steps": 2,
    "schedule.lag": 1,
    "data.held_out": 4,
    "evaluation.n": 1,
    "run.threads": 1,
}
# Run elsewhere: make by CI and a person, torchrun by test_train_live.py, eval, benchmarks and studies by their tests.
ELSEWHERE = ("make ", "torchrun ", "python -m benchmarks ", "python -m experiments.lag_map ", "oapl eval ")


def run(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "oapl_engine.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 8
    for line in COMMANDS:
        for recipe in re.findall(r"recipes/\S+\.toml", line):
            assert (ROOT / recipe).exists(), line
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text(), line


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if c.startswith("oapl ") and "micro.toml" not in c and not c.startswith(ELSEWHERE)]
)
def test_commands_without_an_engine(line, tmp_path, micro_model, micro_rollouts):
    words = line.split()[1:]
    if words[0] in ("rollouts", "figure", "doctor"):
        arguments = ["--data.path", str(micro_rollouts), "--model.path", str(micro_model), "--schedule.steps", "1"]
        run(["train", "recipes/micro_offline.toml", *arguments, "--run.dir", str(tmp_path)], tmp_path)
        words[1] = str(tmp_path)
        words[2:3] = [str(tmp_path / "run.svg")] if words[0] == "figure" else words[2:3]
    elif words[0] == "sft":
        words += ["--train.steps", "2", "--model.out", str(tmp_path / "model")]
    elif "--help" not in words:
        words += ["--model.path", str(micro_model), "--run.dir", str(tmp_path)]
    out = run(words, tmp_path)
    if "micro_offline" in line:
        assert out.splitlines()[-1].startswith("done: steps=48 ")


@pytest.mark.live
def test_a_command_with_an_engine(tmp_path, micro_model):
    line = next(c for c in COMMANDS if "--schedule.lag 16" in c)
    small = [word for k, v in SMALL.items() for word in (f"--{k}", str(v))]
    words = [*line.split()[1:], *small, "--model.path", str(micro_model), "--run.dir", str(tmp_path)]
    assert run(words, tmp_path).splitlines()[-1].startswith("done: steps=2 ")


def test_nothing_is_left_out():
    for line in COMMANDS:
        assert line.startswith(("oapl ", *ELSEWHERE)), f"{line}: no test runs it"
