"""What is wrong with a recipe is found before a model is loaded or trained."""

import json

import pytest

from oapl_engine.errors import ConfigError, find_modules_in, load_object
from oapl_engine.orchestrator import preflight
from oapl_engine.orchestrator.preflight import check_fields_are_read, check_recipe


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
    return path


def jsonl(path, *more):
    return ["--data.source", "jsonl", "--data.path", path, "--data.task", "", "--data.options={}", *more]


def test_good_recipes_pass(make_recipe, problems):
    check_recipe(make_recipe())
    check_recipe(make_recipe(*jsonl(problems, "--data.held_out", 2)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.held_out", 6], r"held_out = 6: problems has 6 problems"),
        (["--data.held_out", 2, "--objective.name", "oapal"], r"objective\.name"),
        (["--data.held_out", 2, "--weights.transport", "pigeon"], r"weights\.transport"),
        (["--data.held_out", 2, "--reward.name", "no_such_module:f"], r"no_such_module"),
        (["--data.held_out", 2, "--reward.name", "json:loads"], r"json:loads.*whose record has question, answer"),
    ],
)
def test_bad_recipes_are_refused(make_recipe, problems, words, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe(make_recipe(*jsonl(problems, *words)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--schedule.mode", "sync", "--schedule.lag", 1, "--schedule.max_kl", 0.5],
            r"max_kl = 0\.5 has no effect .*sync",
        ),
        (["--objective.name", "grpo", "--objective.beta2", 0.5], r"beta2 = 0\.5 has no effect with objective\.name"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(make_recipe, words, message):
    """What the file wrote for the objective that an override replaces is passed over: beta1 of micro.toml here."""
    with pytest.raises(ConfigError, match=message):
        check_fields_are_read(make_recipe(*words), [str(word) for word in words])
    check_fields_are_read(make_recipe(*words[:-2]), [str(word) for word in words[:-2]])


def test_offline_refuses_what_needs_an_engine(make_recipe, tmp_path):
    words = ["--schedule.mode", "offline", *jsonl(tmp_path / "none.jsonl"), "--reward.name", "exact"]
    with pytest.raises(ConfigError, match=r"reward\.name = 'exact' has no effect with schedule\.mode = \"offline\""):
        check_fields_are_read(make_recipe(*words), [str(word) for word in words])


def test_a_missing_data_file_is_refused(make_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist"):
        check_recipe(make_recipe(*jsonl(tmp_path / "none.jsonl")))
    offline = ["--schedule.mode", "offline", *jsonl(tmp_path / "none.jsonl")]
    with pytest.raises(ConfigError, match=r"is not a file"):
        check_recipe(make_recipe(*offline), list(map(str, offline)))


def test_a_missing_tracker_is_refused(make_recipe, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_recipe(make_recipe("--report.wandb", "project"))


def test_modules_beside_the_recipe_are_found_last(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "beside_the_recipe.py").write_text("x = 7\n")
    (tmp_path / "json.py").write_text("loads = None\n")
    find_modules_in(tmp_path)
    assert load_object("beside_the_recipe:x", "reward.name") == 7
    assert load_object("json:loads", "reward.name") is json.loads


def test_a_module_that_fails_when_imported_is_bad_input(tmp_path, monkeypatch):
    (tmp_path / "fails_when_imported.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)fails_when_imported fails when imported:.*ZeroDivisionError"):
        load_object("fails_when_imported:f", "reward.name")
