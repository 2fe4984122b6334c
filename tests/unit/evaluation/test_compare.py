"""`oapl eval`: several models on the same problems by live engines; stopped and resumed; bad input."""

import json
import re

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
    recipe = evaluation_recipe(["models/x", str(tmp_path / "run")], "", 4, [1], [])
    assert (recipe.data.source, recipe.data.task) == ("micro", "sort")


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="no run with a task"):
        evaluation_recipe(["models/x"], "", 4, [1], [])
    with pytest.raises(ConfigError, match="1 <= k <= n"):
        evaluation_recipe(["models/x"], "micro:sort", 4, [1, 8], [])
    with pytest.raises(ConfigError, match="unknown field size"):
        evaluation_recipe(["models/x"], "micro:sort", 4, [1], ["--data.size", "3"])
    with pytest.raises(ConfigError, match="does not exist"):
        find_target(str(tmp_path / "missing"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_target(str(tmp_path / "run"))


@pytest.mark.live
def test_two_models_are_compared_and_a_stopped_evaluation_goes_on(oapl, refused, micro_model, tmp_path):
    fresh = tmp_path / "untrained"
    assert oapl("sft", "recipes/micro_sft.toml", "--train.steps", 1, "--model.out", fresh).returncode == 0
    out = tmp_path / "out"
    words = ["--task", "micro:sort", "--n", 4, "--data.held_out", 12, "--data.template", "raw"]
    words += ["--sampling.max_new_tokens", 8, "--out", out, "--run.threads", 1]
    done = oapl("eval", fresh, micro_model, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: models=2 problems=12 n=4 out={out}"
    assert (out / "pass_at_k.svg").stat().st_size > 0
    table = {row[0]: row[1:] for row in re.findall(r"│ +(.+?) +│ +(\S+) ± (\S+) +│", done.stdout)}
    assert table["untrained"] == ("0.0000", "0.0000")
    assert float(table["micro"][0]) == float(table["− untrained"][0]) > 0.1

    kept = out / "micro" / "eval_problems.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("".join(line + "\n" for line in reversed(lines[:5])))
    again = oapl("eval", fresh, micro_model, *words)
    assert "micro: 7 problems x 4 samples" in again.stderr
    assert "untrained: " not in again.stderr
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {r["problem"] for r in rows} == {json.loads(line)["problem"] for line in lines}
    assert len(rows) == 12
    refused(["another template", "--out"], "eval", micro_model, *words, "--data.template", "{question}")
    refused(["another temperature", "--out"], "eval", micro_model, *words, "--evaluation.temperature", 0.5)
