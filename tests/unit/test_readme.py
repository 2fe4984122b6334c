"""Every command and example that README.md shows works; those that need an engine are in tests/live/test_readme.py."""

import re
import subprocess
import sys
from contextlib import closing

import pytest

from oapl_engine.config import load_recipe
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.task import load_task
from oapl_engine.orchestrator.preflight import check_fields_are_read, check_names
from oapl_engine.rewards import VerifierPool
from tests.conftest import ROOT
from tests.support.readme import COMMANDS, OWN_RUN, TEXT, write_own_files

# Run elsewhere: make by CI and a person, two ranks by tests/live/test_ranks.py, eval by tests/live/test_evaluation.py,
# the run on own data by tests/live/test_readme.py.
ELSEWHERE = ("make ", "torchrun ", "oapl eval ", OWN_RUN)


def run_oapl(*words):
    """Standard output of `oapl …`, which must succeed."""
    command = [sys.executable, "-m", "oapl_engine.cli", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 90


def test_readme_names_files_and_targets_that_exist():
    assert len(COMMANDS) >= 8
    for line in COMMANDS:
        for recipe in re.findall(r"recipes/\S+\.toml", line):
            assert (ROOT / recipe).exists(), line
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text(), line
        assert line.startswith(("oapl ", *ELSEWHERE)), f"{line}: no test runs it"


@pytest.fixture(scope="module")
def finished_run(micro_model, micro_rollouts, tmp_path_factory):
    """Directory of a run of one step, offline."""
    directory = tmp_path_factory.mktemp("run")
    fields = ("--data.path", micro_rollouts, "--model.path", micro_model, "--schedule.steps", 1, "--run.dir", directory)
    run_oapl("train", "recipes/micro_offline.toml", *fields)
    return directory


@pytest.mark.live
@pytest.mark.parametrize("line", [c for c in COMMANDS if " runs/mine" in c and not c.startswith(ELSEWHERE)])
def test_readme_commands_on_a_run(line, finished_run, tmp_path):
    places = {"runs/mine": finished_run, "mine.svg": tmp_path / "mine.svg"}
    words = [places.get(word, word) for word in line.split()]
    out = run_oapl(*words[1:])
    assert out or (tmp_path / "mine.svg").exists()


@pytest.mark.live
def test_readme_offline_training(micro_model, tmp_path):
    line = next(line for line in COMMANDS if "micro_offline" in line)
    out = run_oapl(*line.split()[1:], "--model.path", micro_model, "--run.dir", tmp_path)
    assert out.splitlines()[-1].startswith("done: steps=48 ")


@pytest.mark.live
def test_readme_warm_start(tmp_path):
    line = next(line for line in COMMANDS if line.startswith("oapl sft "))
    run_oapl(*line.split()[1:], "--train.steps", 2, "--model.out", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()


def test_readme_help():
    assert "--schedule.lag" in run_oapl("train", "--help")


def test_readme_own_data_and_reward(tmp_path, monkeypatch):
    problem = write_own_files(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = OWN_RUN.replace("problems.jsonl", str(tmp_path / "problems.jsonl")).split()
    recipe = load_recipe(ROOT / words[2], words[3:])
    check_names(recipe)
    check_fields_are_read(recipe, words[3:])
    task = load_task(recipe.data, 0, micro_tokenizer())
    assert len(task.held_out) == recipe.data.held_out
    assert task.prompt(0).record.keys() == {"question", "answer"}
    items = [(text, problem) for text in (f"{problem['answer']}\n", "-100", "no idea")]
    with closing(VerifierPool()) as pool:
        verdicts = pool.verify_many(recipe.reward.name, items, recipe.reward.options)
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.1, 0.0]
