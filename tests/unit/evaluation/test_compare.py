"""`oapl eval`: what its arguments stand for; bad input. With a live engine: tests/live/test_evaluation.py."""

import pytest

from oapl_engine.config import DataConfig
from oapl_engine.errors import ConfigError
from oapl_engine.evaluation.compare import evaluation_recipe, find_target, parse_task


def test_what_a_task_stands_for():
    assert parse_task("math500", DataConfig()).source == "benchmark"
    assert parse_task("micro:sort", DataConfig()).task == "sort"
    assert parse_task("jsonl:my.jsonl", DataConfig()).path == "my.jsonl"
    with pytest.raises(ConfigError, match="SOURCE:NAME"):
        parse_task("sort", DataConfig())


def test_the_first_run_says_the_task(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('[data]\nsource = "micro"\ntask = "sort"\n')
    recipe = evaluation_recipe(["models/x", str(tmp_path / "run")], [], "", 4, [1], [])
    assert (recipe.data.source, recipe.data.task) == ("micro", "sort")


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="no run with a task"):
        evaluation_recipe(["models/x"], [], "", 4, [1], [])
    with pytest.raises(ConfigError, match="1 <= k <= n"):
        evaluation_recipe(["models/x"], [], "micro:sort", 4, [1, 8], [])
    with pytest.raises(ConfigError, match="unknown field size"):
        evaluation_recipe(["models/x"], [], "micro:sort", 4, [1], ["--data.size", "3"])
    with pytest.raises(ConfigError, match="does not exist"):
        find_target(str(tmp_path / "missing"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_target(str(tmp_path / "run"))
