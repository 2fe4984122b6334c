"""SOURCES: what a source reads of [data]. What it does not read must not be set (orchestrator/preflight.py)."""

import pytest

from oapl_engine.config import DataConfig, load_recipe
from oapl_engine.data.sources import GIVEN, SOURCES, unread_data_fields
from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.preflight import check_fields_are_read
from tests.conftest import ROOT

FILE = ["--data.source", "jsonl", "--data.path", "x.jsonl"]


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("jsonl", {"data.task", "data.options"}),
        ("micro", {"data.path"}),
        ("hf", {"data.path"}),
        ("benchmark", set()),
        ("package.module:factory", set()),
    ],
)
def test_what_a_source_does_not_read(source, unread):
    assert set(unread_data_fields(source)) == unread


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*FILE, "--data.task", "gsm8k"], r"data\.task = 'gsm8k' has no effect with data\.source = \"jsonl\""),
        (["--data.path", "x.jsonl"], r"data\.path = 'x\.jsonl' has no effect with data\.source = \"micro\""),
        (["--schedule.mode", "offline", *FILE, "--data.held_out", "3"], r"data\.held_out = 3 .*mode = \"offline\""),
    ],
)
def test_a_field_that_is_not_read_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        check_fields_are_read(load_recipe(ROOT / "recipes" / "micro.toml", words), words)


def test_what_the_file_wrote_for_another_source_is_passed_over():
    """micro.toml has a task and options for its own source."""
    check_fields_are_read(load_recipe(ROOT / "recipes" / "micro.toml", FILE), FILE)
    with pytest.raises(ConfigError, match=r"data\.task = 'sort' has no effect"):
        check_fields_are_read(load_recipe(ROOT / "recipes" / "micro.toml", FILE))


RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.toml")) if "sft" not in path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_set_nothing_that_is_not_read(path):
    check_fields_are_read(load_recipe(path))


def test_each_source_reads_fields_that_exist():
    fields = set(DataConfig.__dataclass_fields__)
    for name, kind in SOURCES.items():
        assert set(kind.requires) <= set(kind.reads) <= set(GIVEN) <= fields, name
        assert kind.by_name in (None, *kind.reads), name
