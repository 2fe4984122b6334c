"""`python -m benchmarks against`: its command line, on this checkout against itself. Its times are not judged here."""

import json

import pytest

from benchmarks import against
from tests.conftest import ROOT


def test_against_prints_and_writes_both_medians(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert against.main([str(ROOT), "--small", "--rounds", "3", "--only", "4", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["name"], row["unit"], len(row["samples"])) == ("core.step", "events/s", 3)
    assert row["other"] == sorted(other for other, _ in row["samples"])[1]
    assert row["ratio"] == row["this"] / row["other"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("| core.step ")


@pytest.mark.parametrize(("words", "message"), [(["."], "not a checkout"), ([str(ROOT), "--only", "9"], "from 1 to 7")])
def test_against_refuses_what_it_cannot_compare(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert against.main(words) == 2
    assert message in capsys.readouterr().err
