"""SOURCES: what a source reads of [data]. What it does not read must not be set."""

import pytest

from oapl_engine.config import DataConfig, load_recipe
from oapl_engine.data.sources import SOURCES, check_source, open_source
from oapl_engine.errors import ConfigError
from tests.conftest import ROOT

FILE = {"source": "jsonl", "path": "x.jsonl"}
UNREAD = {
    "task of a file": (FILE | {"task": "gsm8k"}, True, 'data.task = .*"jsonl" does not read it .*"benchmark"'),
    "options of a file": (FILE | {"options": {"n": 3}}, True, 'data.options = .* does not read .*"hf".*set it to {}'),
    "file of micro": ({"source": "micro", "task": "sort", "path": "x"}, True, 'data.path = .*"micro" .*"jsonl"'),
    "file of the hub": ({"source": "hf", "task": "a/b", "path": "x"}, True, 'data.path = .*"hf" does not read it'),
    "template": (FILE | {"template": "raw"}, False, 'data.template = .raw.: .* in mode = "offline" .the modes that'),
    "system": (FILE | {"system": "x"}, False, "data.system = .*offline"),
    "held_out": (FILE | {"held_out": 3}, False, "data.held_out = 3.*set it to 64"),
    "long prompts": ({"source": "parquet", "path": "x", "max_prompt_tokens": 9}, False, "data.max_prompt_tokens = 9"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_field_that_is_not_read_is_refused(case):
    fields, generates, message = UNREAD[case]
    with pytest.raises(ConfigError, match=message):
        check_source(DataConfig(**fields), generates)


PROMPTS = {"template": "raw", "held_out": 3, "max_prompt_tokens": 9}


@pytest.mark.parametrize(
    ("fields", "generates"),
    [
        (FILE | PROMPTS, True),
        (FILE, False),
        ({"source": "micro", "task": "sort", "options": {"digits": 3}} | PROMPTS, True),
        ({"source": "benchmark", "task": "gsm8k", "path": "x", "system": "Count."}, True),
        ({"source": "json:loads", "task": "x", "path": "y", "options": {"z": 1}} | PROMPTS, True),
    ],
)
def test_a_field_that_is_read_may_be_set(fields, generates):
    """A source of one's own reads what it likes."""
    check_source(DataConfig(**fields), generates)


def test_opening_a_source_checks_it(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": 1}\n')
    data = DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), options={"size": 3})
    with pytest.raises(ConfigError, match=r"data\.options"):
        open_source(data)


RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.toml")) if "sft" not in path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_set_nothing_that_is_not_read(path):
    recipe = load_recipe(path)
    check_source(recipe.data, recipe.schedule.traits.generates)


def test_each_source_reads_fields_that_exist():
    fields = set(DataConfig.__dataclass_fields__)
    for name, kind in SOURCES.items():
        assert set(kind.requires) <= set(kind.reads) <= fields, name
        assert kind.by_name in (None, *kind.reads), name
