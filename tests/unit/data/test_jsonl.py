"""JSONL and hub sources: files as people have them, and every bad input names the place."""

import datetime
import gzip
import json
import math
import os
import sys
import types

import numpy as np
import pytest

from oapl_engine.config import DataConfig
from oapl_engine.data.hub import hub_source
from oapl_engine.data.jsonl import jsonl_source
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.problem import Problem
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
        ("[" * 100_000, "nested too deep"),
        ('{"question": "a", "answer": 2, "x": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        ('{"question": "a", "answer": [1, 2]}', r'"answer" = \[1, 2\] must be .* verifier of your own'),
        ('{"question": "a", "answer": {"x": 1}}', '"answer" = .* must be a text or a number'),
        ('{"question": "a", "reward_model": {"ground_truth": null}}', '"reward_model.ground_truth" = None must be'),
        ('{"question": "a", "answer": 2, "id": null}', '"id" = None must be a text or a number, and not empty$'),
        ('{"question": "a", "answer": 2, "id": "problems-1"}', "id 'problems-1' was used before .*line 1"),
        ('{"question": "a", "answer": 1e400}', "1e400 is beyond the range of numbers"),
        ('{"question": "a", "answer": -1e400}', "-1e400 is beyond"),
        ('{"question": "a", "answer": 0.1e-400}', "0.1e-400 is beyond"),
        ('{"question": "a", "answer": 2, "x": [1e999]}', "1e999 is beyond"),
        ('{"question": "a", "answer": Infinity}', "Infinity is not a JSON value"),
        ('{"question": "a", "answer": 2, "answer": 3}', 'the key "answer" is there twice'),
        ('{"question": "a", "answer": 2, "x": {"y": 1, "y": 1}}', 'the key "y" is there twice'),
        (r'{"question": "\ud83d", "answer": 2}', r"'\\ud83d' is half a surrogate pair"),
        (r'{"question": "a", "answer": "\ude00"}', r"'\\ude00' is half a surrogate pair"),
        (r'{"question": "a", "answer": 2, "id": "\ud83d"}', "half a surrogate pair"),
        (r'{"question": "a", "answer": 2, "x": [{"\ud83d": 1}]}', "half a surrogate pair"),
        ('{"question": "a", "answer": 2},', "not JSON: ',' follows the object"),
        (GOOD + "\r" + GOOD, "not JSON: .*follows the object; write one object per line"),
        ('{"prompt": [], "answer": 2}', "must be a text or a list of messages, and not empty"),
        ('{"prompt": ["a"], "answer": 2}', 'message 1 of "prompt" must be an object'),
        ('{"prompt": [{"role": "user"}], "answer": 2}', 'message 1 of "prompt" .* whose "content" is a text'),
        ('{"prompt": [{"role": "user", "content": " "}], "answer": 2}', '"prompt" = .* and not empty'),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": 2}',
            '"prompt" ends with the assistant',
        ),
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


SUMS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
PLAIN = "\n".join(map(json.dumps, SUMS)).encode()
MARK = b"\xef\xbb\xbf"
FILES = {
    "byte-order mark": MARK + PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "blank lines": b"\n" + PLAIN.replace(b"\n", b"\n \n\n"),
    "gzip": gzip.compress(MARK + PLAIN),
    "array": json.dumps(SUMS).encode(),
    "array over lines": b"\n" + json.dumps(SUMS, indent=2).encode() + b"\n",
    "array with all of it": gzip.compress(MARK + json.dumps(SUMS, indent=2).encode().replace(b"\n", b"\r\n")),
    "integers": json.dumps([row | {"answer": int(row["answer"])} for row in SUMS]).encode(),
    "floats of a data frame": json.dumps([row | {"answer": float(row["answer"])} for row in SUMS]).encode(),
    "chats": json.dumps(
        [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in SUMS]
    ).encode(),
    "verl": json.dumps(
        [{"prompt": row["question"], "reward_model": {"ground_truth": row["answer"], "style": "rule"}} for row in SUMS]
    ).encode(),
}


def read(tmp_path, data, name="p.jsonl"):
    """Problems of a file with these bytes, in no order that matters."""
    source = jsonl_source(DataConfig(source="jsonl", path=write(tmp_path, data, name=name), options={}))
    return [source.problem(i) for i in range(source.size)]


@pytest.mark.parametrize("kind", FILES)
def test_files_as_people_have_them(tmp_path, kind):
    found = read(tmp_path, FILES[kind])
    assert sorted((p.question, p.record["answer"]) for p in found) == [(r["question"], r["answer"]) for r in SUMS]
    assert len({p.id for p in found}) == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PLAIN.decode().encode("utf-16"), r"line 1: not UTF-8 \(byte 0"),
        (PLAIN + b'\n{"question": "8+1=", "ans', "line 7: not JSON"),
        (gzip.compress(PLAIN)[:-20], "cannot be read: Compressed file ended"),
        (json.dumps(SUMS).encode()[:-1], r"line 1: not JSON: neither a comma nor .*\]"),
        (json.dumps(SUMS).encode() + b"[]", "not JSON: .* follows the array"),
        (b'[\n{"question": "a", "answer": 1},\n{"question": "b"}\n]', 'line 3: no field "answer"'),
        (b'[{"question": "a", "answer": 1},\n\n{"question": "\xff"}]', r"line 3: not UTF-8 \(byte 14"),
        (b'[\n{"question": "a", "answer": NaN}]', "line 2: NaN is not a JSON value"),
        (b"[]", "is empty"),
        (MARK, "is empty"),
        (b"", "is empty"),
        (b'{"question": "a", "answer": 1, "id": 1}\n{"question": "b", "answer": 1, "id": "1"}', "2: id '1' .*line 1"),
        (b'{"question": "a", "answer": 1, "id": "p-3"}\n' + PLAIN, "3: id 'p-3' was used before .*line 1.*p-NUMBER"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_line(tmp_path, data, message):
    with pytest.raises(ConfigError, match=rf"p\.jsonl.*{message}"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("6.0", "6"),
        ("-6.00", "-6"),
        ("0.0", "0"),
        ("1e3", "1000"),
        ("2.5e1", "25"),
        ("1e300", "1" + 300 * "0"),
        ("0.10", "0.10"),
        ("1E-3", "1E-3"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("6.00000000000000000001", "6.00000000000000000001"),
        ("-7", "-7"),
        ("9" * 5000, "9" * 5000),
        ('"6.0"', "6.0"),
    ],
)
def test_a_number_as_an_answer(tmp_path, written, text):
    """As an exact verifier compares it: whole numbers as such, the others as the file has them."""
    row = f'{{"question": "a", "answer": {written}, "id": {written}}}'.encode()
    (problem,) = read(tmp_path, row)
    assert (problem.record["answer"], problem.id) == (text, text)


def test_the_record_has_numbers_and_can_be_stored(tmp_path):
    row = b'{"question": "a", "answer": 1, "x": [0.10, 6.0, 7, true, null, {"y": 1e3}], "big": %s}' % (b"9" * 5000)
    (problem,) = read(tmp_path, row)
    x = problem.record["x"]
    assert x == [0.1, 6.0, 7, True, None, {"y": 1000.0}]
    assert [type(value) for value in x[:4]] == [float, float, int, bool]
    assert problem.record["big"] == "9" * 5000
    assert json.loads(json.dumps(problem.record)) == problem.record


def test_a_chat_keeps_its_messages(tmp_path):
    """verl's columns: the user's last message is the question, null fields are left out, the rest is in the record."""
    system, user = {"role": "system", "content": "Count."}, {"role": "user", "content": "7\u2028+\u00001="}
    row = {"data_source": "x", "prompt": [system | {"name": None}, user], "ability": "math", "extra_info": {"index": 3}}
    row["reward_model"] = {"ground_truth": 8.0, "style": "rule"}
    (problem,) = read(tmp_path, json.dumps(row, ensure_ascii=False).encode())
    assert problem.messages == (system, user)
    assert problem.question == user["content"]
    assert json.loads(problem.text) == [system, user]
    others = {name: row[name] for name in ("data_source", "ability", "extra_info", "reward_model")}
    assert problem.record == others | {"answer": "8"}


def test_problems_differ_by_text_and_know_their_place(tmp_path):
    ask = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": "a"},
        {"prompt": ask},
        {"prompt": [{"role": "system", "content": "b"}, *ask]},
        {"prompt": [{"content": "a", "role": "user"}]},
    ]
    found = read(tmp_path, "\n".join(json.dumps(row | {"answer": 1}) for row in rows).encode())
    one, two, three, four = sorted(found, key=lambda p: p.id)
    assert one.text == one.question == "a"
    assert len({one.text, two.text, three.text}) == 3
    assert two.text == four.text
    assert three.place == f"{tmp_path / 'p.jsonl'}, line 3"
    assert one == Problem("p-1", "a", {"answer": "1"})


def test_ids_of_a_zipped_file_are_those_of_the_file(tmp_path):
    assert {p.id for p in read(tmp_path, gzip.compress(PLAIN), "p.jsonl.gz")} == {f"p-{i}" for i in range(1, 7)}


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
    """What datasets.load_dataset returns, as far as it is used."""

    @property
    def column_names(self):
        return list(self[0])


def stub_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub_columns_are_mapped_or_named(monkeypatch):
    stub_datasets(monkeypatch, lambda *_, **__: Table([{"problem": "1+1=", "solution": 2}]))
    problem = hub_source(DataConfig(task="a/b", options={"question": "problem", "answer": "solution"})).problem(0)
    assert (problem.id, problem.question, problem.record) == ("a-b-0", "1+1=", {"answer": "2"})
    assert problem.place == "a/b, row 0"
    with pytest.raises(ConfigError, match='no column "question"'):
        hub_source(DataConfig(task="a/b", options={"answer": "solution"}))
    with pytest.raises(ConfigError, match="did you mean split"):
        hub_source(DataConfig(task="a/b", options={"splt": "test"}))


def hub_problem(monkeypatch, row, **options):
    stub_datasets(monkeypatch, lambda *_, **__: Table([row]))
    return hub_source(DataConfig(task="a/b", options=options)).problem(0)


def test_hub_column_wins_over_another_of_the_fields_name(monkeypatch):
    """Whichever comes last in the table."""
    for row in ({"problem": "a", "question": "b"}, {"question": "b", "problem": "a"}):
        assert hub_problem(monkeypatch, row | {"answer": 1}, question="problem").question == "a"


def test_hub_rows_of_verl_need_no_answer(monkeypatch):
    row = {"prompt": [{"role": "user", "content": "a", "name": None}], "reward_model": {"ground_truth": "4"}}
    problem = hub_problem(monkeypatch, row)
    assert problem.messages == ({"role": "user", "content": "a"},)
    assert problem.record["answer"] == "4"


def test_hub_values_become_json(monkeypatch):
    row = {"question": "a", "answer": np.float64(6), "n": np.int64(2), "x": np.array([1.5]), "nan": math.nan}
    problem = hub_problem(monkeypatch, row | {"day": datetime.date(2026, 8, 1), "pair": (1, 2)})
    assert problem.record == {"answer": "6", "n": 2, "x": [1.5], "nan": None, "day": "2026-08-01", "pair": [1, 2]}
    json.dumps(problem.record)
    for value, message in ((math.nan, '"answer" = None must be'), (math.inf, "inf is not a value that JSON has")):
        with pytest.raises(ConfigError, match=f"a/b, row 0: {message}"):
            hub_problem(monkeypatch, {"question": "a", "answer": value})
    with pytest.raises(ConfigError, match="a/b, row 0: b'x' is not a value that JSON has"):
        hub_problem(monkeypatch, {"question": "a", "answer": 1, "image": b"x"})


def test_hub_offline_is_clear(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route to host")

    stub_datasets(monkeypatch, load)
    with pytest.raises(ConfigError, match=r"a/b.*no route to host.*network"):
        hub_source(DataConfig(task="a/b", options={}))
