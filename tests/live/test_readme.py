"""The commands of README.md that need an engine, made small."""

import pytest

from tests.support.readme import OWN_RUN, write_own_files

pytestmark = pytest.mark.live


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
    done = oapl(*OWN_RUN.split()[1:], *words, PYTHONPATH=str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done: steps=2 ")
