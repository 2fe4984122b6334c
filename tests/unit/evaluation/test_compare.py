"""`oapl eval`: what its arguments stand for; bad input. With a live engine: tests/live/test_evaluation.py."""

import json
import shutil
from dataclasses import replace

import pytest

from oapl_engine.config import DataConfig, Recipe, RewardConfig, SamplingConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.errors import ConfigError
from oapl_engine.evaluation import compare
from oapl_engine.evaluation.compare import (
    Examinee,
    ProblemSet,
    Target,
    evaluation_recipe,
    find_target,
    name_apart,
    parse_task,
    problem_set,
)
from oapl_engine.trainer.loading import read_text_config


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


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("micro:sort", ["--evaluation.n", "2"], "use --n"),
        ("micro:sort", ["--evaluation.k=[1]"], "use --k"),
        ("micro:sort", ["--run.dir", "x"], "use --out"),
        ("micro:sort", ["--model.path", "x"], "use MODEL_OR_RUN"),
        ("micro:sort", ["--optimizer.learning_rate", "1e-3"], "optimizer.learning_rate has no effect"),
        ("micro:sort", ["--objective.options.clip_low", "0.1"], "objective.options has no effect"),
        ("micro:sort", ["--model.lora_rank", "2"], "model.lora_rank has no effect"),
        ("micro:sort", ["--data.task", "addition"], "data.task has no effect in oapl eval with --task: use --task"),
        ("jsonl:a.jsonl", ["--data.path", "b.jsonl"], "data.path has no effect in oapl eval with --task"),
        ("micro:sort", ["--data.path", "b.jsonl"], r"data.path = 'b.jsonl' has no effect with data.source = \"micro\""),
        ("jsonl:a.jsonl", ["--data.options.digits", "3"], "data.options = .* has no effect"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(task, words, message):
    with pytest.raises(ConfigError, match=message):
        evaluation_recipe(["models/x"], [], task, 4, [1], words)


def test_a_run_on_an_own_source_needs_no_task(tmp_path):
    (tmp_path / "config.toml").write_text('[data]\nsource = "mine:problems"\n')
    assert evaluation_recipe([str(tmp_path)], [], "", 4, [1], []).data.source == "mine:problems"


def test_results_that_have_no_place_are_bad_input(problems, tmp_path, model_folder):
    words = ["--data.template", "raw", "--sampling.max_new_tokens", "8", "--data.max_prompt_tokens", "10"]
    target = Target("llama", str(model_folder("llama")))
    recipe = evaluation_recipe([target.folder], [target], f"jsonl:{problems}", 1, [1], words)
    with pytest.raises(ConfigError, match=r"--out: .*problems\.jsonl/llama cannot be made: Not a directory"):
        compare.evaluate_targets([target], recipe, True, problems, print)


def test_models_with_one_name_are_told_apart_by_their_paths():
    targets = [Target("micro", "models/micro"), Target("micro", "runs/micro/step_1", 1), Target("other", "x")]
    labels = [target.label for target in name_apart(targets, ["models/micro/", "runs/micro", "x"])]
    assert labels == ["models/micro", "runs/micro", "other"]
    with pytest.raises(ConfigError, match="named twice"):
        name_apart(targets[:2], ["models/micro", "models/../models/micro"])


def test_a_task_brings_its_own_way_of_asking(tmp_path, model_folder):
    """Of a run it keeps the engine's settings: its template, stop tokens and verifier belong to the run's own task."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(
        '[data]\nsource = "micro"\ntask = "sort"\ntemplate = "raw"\noptions = { digits = 6 }\n'
        "[sampling]\nmax_new_tokens = 8\nstop_token_ids = [31]\n"
        '[reward]\nname = "exact"\n[rollout]\nkv_cache_mb = 512\n'
    )
    models, targets = [str(tmp_path / "run")], [Target("run", str(model_folder("llama")))]
    recipe = evaluation_recipe(models, targets, "gsm8k", 4, [1], ["--data.path", "x.jsonl"])
    positions = read_text_config(targets[0].folder)["max_position_embeddings"]
    assert recipe.data == replace(DataConfig(), source="benchmark", task="gsm8k", path="x.jsonl")
    assert recipe.sampling == replace(SamplingConfig(), max_new_tokens=min(1024, positions // 2))
    assert (recipe.reward.name, recipe.rollout.kv_cache_mb) == ("", 512)
    asked = evaluation_recipe(models, targets, "gsm8k", 4, [1], ["--sampling.max_new_tokens", "9"])
    assert asked.sampling.max_new_tokens == 9


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    questions = ["1+1=", "2+1=", "1+" * 40 + "1="]
    path.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in questions))
    return path


def test_long_problems_are_left_out_and_listed(problems):
    data = DataConfig(source="jsonl", path=str(problems), template="raw", max_prompt_tokens=10)
    found = problem_set(data, RewardConfig(), 0, micro_tokenizer(), full_set=True)
    assert sorted(prompt.id for prompt in found.prompts) == ["problems-1", "problems-2"]
    assert found.left_out == {"problems-3": 82}
    with pytest.raises(ConfigError, match="all 3 problems are longer than 1 tokens"):
        problem_set(replace(data, max_prompt_tokens=1), RewardConfig(), 0, micro_tokenizer(), full_set=True)


def test_results_belong_to_the_contents_that_they_were_made_with(problems, tmp_path, model_folder):
    """The same file name with other problems, and the same folder with other weights, are refused."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    data = DataConfig(source="jsonl", path=str(problems), template="raw")
    found = ProblemSet((), "exact", {})
    examinee = Examinee(Target("m", str(folder)), replace(Recipe(), data=data), None, (2,), found, 64)
    out = tmp_path / "out"
    out.mkdir()
    (out / "about.json").write_text(json.dumps(compare._settings(examinee)))
    rows = {"step": 0, "version": 0, "task": "t", "seed": 0, "n": 1, "temperature": 1.0, "problem": "p", "correct": 0}
    (out / "eval_problems.jsonl").write_text(json.dumps(rows | {"invalid": 0}) + "\n")
    compare._check_same_settings(out, examinee)
    with problems.open("a") as file:
        file.write('{"question": "9+1=", "answer": "10"}\n')
    with pytest.raises(ConfigError, match=r"another content of data\.path: name another --out"):
        compare._check_same_settings(out, examinee)
    (out / "eval_problems.jsonl").unlink()
    compare._check_same_settings(out, examinee)  # a start that failed binds nothing
