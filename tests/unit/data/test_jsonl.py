"""JSONL and hub sources: every bad input names the place."""

import json
import os
import sys
import types

import pytest

from oapl_engine.config import DataConfig
from oapl_engine.data.hub import hub_source
from oapl_engine.data.jsonl import jsonl_source
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError

GOOD = '{"question": "1+1=", "answer": 2, "level": "easy"}'


def write(tmp_path, *lines, name="problems.jsonl"):
    file = tmp_path / name
    file.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return str(file)


def test_fields_and_ids(tmp_path):
    path = write(tmp_path, GOOD, "", '{"prompt": "2+2=", "answer": "4", "id": 7}', '{"question": "f", "tests": []}')
    source = jsonl_source(DataConfig(source="jsonl", path=path, options={}))
    problems = {p.id: p for p in map(source.problem, range(source.size))}
    assert problems["problems-1"].record == {"answer": "2", "level": "easy"}
    assert problems["7"].question == "2+2="
    assert problems["problems-4"].record == {"tests": []}
    assert set(problems) == {"problems-1", "7", "problems-4"}


def test_load_task_reads_a_file(tmp_path):
    path = write(tmp_path, *(json.dumps({"question": f"{i}+1=", "answer": i + 1}) for i in range(50)))
    task = load_task(DataConfig(source="jsonl", path=path, template="raw", held_out=10), 0, micro_tokenizer())
    assert (task.size, len(task.held_out), task.source.verifier, task.source.name) == (40, 10, "exact", "problems")
    assert [p.id for p in task.held_out] != [f"problems-{i}" for i in range(1, 11)]  # no block from the top of the file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "1+1=", "answer": 2', "not JSON"),
        ("[1, 2]", "must be an object.*not list"),
        ('{"answer": 2}', r'no field "question".*answer'),
        ("{}", r'no field "question".*none'),
        ('{"question": "a", "prompt": "b", "answer": 2}', "both"),
        ('{"question": "  ", "answer": 2}', "not empty"),
        ('{"question": 5, "answer": 2}', "must be a text"),
        ('{"question": "a"}', 'no field "answer"'),
        ('{"question": "a", "answer": ""}', '"answer" = .*not empty'),
        ('{"question": "a", "answer": null}', '"answer" = None'),
        ('{"question": "a", "answer": true}', '"answer" = True'),
        ('{"question": "a", "answer": NaN}', "NaN is not a JSON value"),
        ('{"question": "a", "answer": 2, "id": ""}', '"id" = '),
        (b'{"question": "\xff", "answer": 2}', "not UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(ConfigError, match=rf"(?s)problems\.jsonl, line 3: .*{message}"):
        jsonl_source(DataConfig(source="jsonl", path=path, options={}))


def test_duplicate_ids_name_both_lines(tmp_path):
    row = '{"question": "a", "answer": 1, "id": "x"}'
    with pytest.raises(ConfigError, match=r"line 3: id 'x' was used before .*line 1"):
        jsonl_source(DataConfig(source="jsonl", path=write(tmp_path, row, GOOD, row), options={}))


def test_missing_empty_and_directory(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"does not exist; did you mean problems\.jsonl"):
        jsonl_source(DataConfig(source="jsonl", path=str(tmp_path / "problem.jsonl"), options={}))
    with pytest.raises(ConfigError, match=r"does not exist$"):
        jsonl_source(DataConfig(source="jsonl", path=str(tmp_path / "no" / "problem.jsonl"), options={}))
    with pytest.raises(ConfigError, match="is a directory"):
        jsonl_source(DataConfig(source="jsonl", path=str(tmp_path), options={}))
    with pytest.raises(ConfigError, match="is empty"):
        jsonl_source(DataConfig(source="jsonl", path=write(tmp_path, "", "  ", name="e.jsonl"), options={}))
    with pytest.raises(ConfigError, match=r"data\.options"):
        jsonl_source(DataConfig(source="jsonl", path=write(tmp_path, GOOD), options={"size": 3}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path):
    path = write(tmp_path, GOOD)
    os.chmod(path, 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        jsonl_source(DataConfig(source="jsonl", path=path, options={}))


def test_hub_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        hub_source(DataConfig(task="openai/gsm8k", options={}))


class Table(list):
    column_names = ("problem", "solution")


def stub_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub_columns_are_mapped_or_named(monkeypatch):
    stub_datasets(monkeypatch, lambda *_, **__: Table([{"problem": "1+1=", "solution": 2}]))
    problem = hub_source(DataConfig(task="a/b", options={"question": "problem", "answer": "solution"})).problem(0)
    assert (problem.id, problem.question, problem.record) == ("a-b-0", "1+1=", {"answer": "2"})
    with pytest.raises(ConfigError, match='no column "question"'):
        hub_source(DataConfig(task="a/b", options={"answer": "solution"}))
    with pytest.raises(ConfigError, match="did you mean split"):
        hub_source(DataConfig(task="a/b", options={"splt": "test"}))


def test_hub_offline_is_clear(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route to host")

    stub_datasets(monkeypatch, load)
    with pytest.raises(ConfigError, match=r"a/b.*no route to host.*network"):
        hub_source(DataConfig(task="a/b", options={}))
