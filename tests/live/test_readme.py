"""The commands of README.md that need an engine, made small."""

import os

import pytest

from tests.conftest import ROOT
from tests.support.readme import COMMANDS, OWN_RUN, write_own_files

pytestmark = pytest.mark.live
AFTERWARDS = [line.split()[1:] for line in COMMANDS if "runs/mine" in line and line != OWN_RUN]
ON_A_BENCHMARK = ["eval", "runs/mine", "--task", "gsm8k", "--data.path", "gsm8k.jsonl"]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def test_readme_trains_on_own_data_with_an_own_reward(oapl, tmp_path, micro_model):
    write_own_files(tmp_path)
    small = {
        "data.path": tmp_path / "problems.jsonl",
        "model.path": micro_model,
        "run.dir": tmp_path / "run",
        "run.threads": 1,
        "sampling.stop_token_ids": [],  # the quickstart's are of another vocabulary
        "schedule.steps": 2,
        "schedule.lag": 1,
        "evaluation.n": 1,
    }
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    # the reward is found in the current folder, and the recipe in the repository
    command = [word.replace("recipes/", f"{ROOT}/recipes/") for word in OWN_RUN.split()[1:]]
    words[words.index("--run.dir") + 1] = "runs/mine"
    done = oapl(*command, *words, cwd=tmp_path, PYTHONPATH=PATHS, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done: steps=2 ")
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1+1=", "answer": "it is #### 2"}\n')
    for command in [*AFTERWARDS, ON_A_BENCHMARK]:
        small = ["--n", "2"] if command[0] == "eval" else []
        command = [str(micro_model) if word == "smollm2-135m-instruct" else word for word in command]
        done = oapl(*command, *small, cwd=tmp_path, PYTHONPATH=PATHS)
        assert done.returncode == 0, (command, done.stderr)
    assert done.stdout.splitlines()[-1].startswith("done: models=1 problems=1 ")
