"""A recipe that is wrong is refused with the field, its value, the limit and the way out; a right one round-trips."""

import dataclasses
import shlex
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from oapl_engine import config, config_file
from oapl_engine.cli import configuration_page
from oapl_engine.orchestrator.preflight import check_names
from oapl_engine.sft_config import load_sft_recipe
from tests.conftest import ROOT

GOOD = '[model]\npath = "m"\n[data]\ntask = "chain_sum"\n'


@pytest.fixture
def recipe(tmp_path):
    def write(text=GOOD):
        path = tmp_path / "r.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--schedule.lag -1", ["schedule.lag = -1", "greater than or equal to 1", "optimizer steps"]),
        ("--schedule.lag 0", ["schedule.lag = 0"]),
        ("--schedule.lag nan", ["schedule.lag = nan"]),
        ("--schedule.lag 2.5", ["schedule.lag = 2.5"]),
        ("--schedule.lag true", ["schedule.lag = True"]),
        ("--schedule.lagg 3", ["unknown field lagg", "did you mean lag?"]),
        ("--shedule.lag 3", ["unknown section shedule", "did you mean schedule?"]),
        ("--schedule.group_size 0", ["schedule.group_size = 0"]),
        ("--schedule.group_size 1", ["group_size = 1", "2 rollouts"]),
        ("--schedule.mode fast", ["schedule.mode = 'fast'", "phased"]),
        ("--schedule.steps abc", ["schedule.steps = 'abc'", "integer"]),
        ("--schedule.max_groups_ahead 3", ["schedule.max_groups_ahead = 3", "groups_per_step = 8"]),
        ("--schedule.window 2", ["schedule.window = 2", "async"]),
        ("--optimizer.learning_rate 0", ["optimizer.learning_rate = 0", "greater than 0"]),
        ("--optimizer.learning_rate nan", ["optimizer.learning_rate = nan", "finite"]),
        ("--optimizer.learning_rate -1e-3", ["learning_rate = -0.001"]),
        ("--sampling.temperature 0", ["sampling.temperature = 0"]),
        ("--sampling.temperature -1", ["sampling.temperature = -1"]),
        ("--sampling.top_p 0.9", ["top_p = 0.9", "nucleus", 'behavior = "recomputed"']),
        ("--sampling.top_k 5", ["top_k = 5"]),
        ("--objective.beta1 0", ["objective.beta1 = 0"]),
        ("--objective.beta1 nan", ["objective.beta1 = nan"]),
        ("--objective.beta2 inf", ["objective.beta2 = inf"]),
        ("--data.template 'no field'", ["data.template", "{question}"]),
        ("--evaluation.k [8]", ["evaluation.k = 8", "evaluation.n = 4"]),
        ("--model.path ''", ["model.path is empty"]),
        ("--schedule.mode sync", ["sync", "lag = 1"]),
        ("--schedule.lag", ["has no value"]),
        ("--lag 3", ["--section.field value"]),
        ("--data.held_out 0", ["data.held_out = 0", "evaluation.n = 0"]),
        ("--schedule.credit 3", ["schedule.credit is now schedule.max_groups_ahead"]),
        ("--schedule.allowance 3", ["schedule.allowance is now schedule.max_uses"]),
        ("--weights.golden_prompts 3", ["weights.golden_prompts is now weights.probe_prompts"]),
        ("--rollout.engines 2", ["rollout.engines is gone", "--nproc-per-node"]),
        ("--train.precision bfloat16", ["train.precision", "rollout.engine_dtype"]),
    ],
)
def test_what_is_wrong_is_named(recipe, override, words):
    with pytest.raises(config.ConfigError) as error:
        config.load_recipe(recipe(), shlex.split(override))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--data.task ''", ["data.task is empty"]),
        ("--data.source jsonl", ["data.path is empty"]),
        ("--data.source jsnl", ['data.source = "jsnl"', "did you mean jsonl?"]),
        ("--data.source nowhere:make", ["nowhere"]),
        ("--schedule.mode offline", ['data.source = "reasoning_gym"', "parquet"]),
        ("--weights.transport pigeon", ["weights.transport", "pigeon", "memfd"]),
        ("--reward.name exacct", ["exacct"]),
        ("--objective.name oappl", ["oappl", "did you mean oapl?"]),
    ],
)
def test_names_are_checked_before_anything_loads(recipe, override, words):
    """Names that a table of another part resolves; a recipe alone may name what only the run's machine has."""
    loaded = config.load_recipe(recipe(), shlex.split(override))
    with pytest.raises(config.ConfigError) as error:
        check_names(loaded)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ([], "float32"),
        (["--rollout.engine_dtype", "bfloat16"], "auto"),
        (["--model.dtype", "bfloat16"], "auto"),
        (["--rollout.engine_dtype", "bfloat16", "--train.precision", "bfloat16"], "bfloat16"),
        (["--schedule.mode", "offline", "--data.source", "jsonl", "--data.path", "x"], "auto"),
    ],
)
def test_products_round_only_what_the_engine_rounds_too(recipe, overrides, precision):
    assert config.resolve_train_config(config.load_recipe(recipe(), overrides)).precision == precision


def test_async_cannot_recompute(recipe):
    with pytest.raises(config.ConfigError, match="async"):
        config.load_recipe(recipe(), ["--schedule.mode", "async", "--objective.behavior", "recomputed"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model\n", "not TOML"),
        ("x = 1\n", "unknown section x"),
        ("model = 3\n", "must be a table"),
        ('[modl]\npath = "x"\n', "did you mean model?"),
        ('[model]\npath = 3\n[data]\ntask = "x"\n', "model.path = 3"),
    ],
)
def test_a_broken_file_is_named(recipe, text, words):
    with pytest.raises(config.ConfigError, match=words.replace("?", r"\?")):
        config.load_recipe(recipe(text))


def test_missing_directory_and_not_utf8(tmp_path):
    (tmp_path / "micro.toml").write_text(GOOD)
    with pytest.raises(config.ConfigError, match=r"did you mean .*micro\.toml"):
        config.load_recipe(tmp_path / "micr.toml")
    with pytest.raises(config.ConfigError, match="is a directory"):
        config.load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[model]\npath = "\xe9"\n')
    with pytest.raises(config.ConfigError, match="not UTF-8"):
        config.load_recipe(tmp_path / "latin.toml")


def test_the_command_line_says_it_in_one_line(refused, recipe):
    refused("recipe nothing.toml does not exist", "train", "nothing.toml")
    refused("did you mean lag?", "train", recipe(), "--schedule.lg", "3")
    refused("model.out is empty", "sft", recipe('[data]\ntask = "sort"\n'))
    refused("holds no rollouts", "rollouts", "nowhere")


def test_overrides_beat_the_file_and_recipes_round_trip(recipe, tmp_path):
    """Overrides beat the file and the resolved recipe round trips."""
    first = config.load_recipe(recipe(), ["--schedule.lag=7", "--objective.beta1", "inf", "--data.options.digits", "6"])
    assert (first.schedule.lag, first.objective.beta1, first.data.options) == (7, float("inf"), {"digits": 6})
    assert first.run.dir == "runs/r"
    (tmp_path / "config.toml").write_bytes(tomli_w.dumps(config_file.to_toml(first)).encode())
    assert config.load_recipe(tmp_path / "config.toml") == first


@settings(max_examples=60, deadline=None)
@given(
    section=st.sampled_from([f.name for f in dataclasses.fields(config.Recipe)]), word=st.text("abcdefgh_", min_size=4)
)
def test_no_unknown_field_passes(section, word):
    with pytest.raises(config.ConfigError, match="unknown field"):
        config_file.build(config.Recipe, {section: {f"{word}x": 1}}, "r.toml")


def test_every_field_says_unit_default_and_why(oapl):
    text = oapl("train", "--help").stdout
    for section, why, fields in config_file.describe(config.Recipe):
        assert why
        assert f"[{section}]" in text
        for name, _, _, reason in fields:
            assert f"--{section}.{name} (" in text
            assert reason
            assert len(reason) > 10


def test_the_configuration_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page(), "run: make docs"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_that_ships_is_valid(path):
    tables = tomllib.loads(path.read_text())
    if "out" in tables.get("model", {}):
        load_sft_recipe(path)
    else:
        config.load_recipe(path)
