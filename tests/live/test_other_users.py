"""A run is read on a read-only mount, and trained on a terminal that is not UTF-8."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.live
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def run(*words, cwd=ROOT, **environment):
    """Output as bytes: it is in the encoding of the terminal."""
    return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, env=os.environ | environment)


def oapl_command(*words):
    return [sys.executable, "-m", "oapl_engine.cli", *words]


@pytest.fixture
def train(micro_model, micro_rollouts, tmp_path):
    """Words of an offline run of two steps by a recipe."""

    def words(recipe=ROOT / "recipes" / "micro_offline.toml"):
        fields = {"model.path": micro_model, "data.path": micro_rollouts, "run.dir": tmp_path / "run"}
        fields |= {"run.threads": 1, "schedule.steps": 2}
        return oapl_command("train", recipe, *(word for name, value in fields.items() for word in (f"--{name}", value)))

    return words


def test_a_run_on_a_read_only_mount_is_read(train, tmp_path):
    if not shutil.which("unshare") or run("unshare", "-m", "true").returncode:
        pytest.skip("unshare -m is not allowed here: it needs root")
    assert run(*train()).returncode == 0
    directory = tmp_path / "run"
    commands = [("rollouts", directory), ("doctor", directory)]
    commands += [("figure", directory, tmp_path / f"{kind}.svg", "--kind", kind) for kind in ("learning", "gantt")]
    for words in commands:
        command = ["bash", "-c", READ_ONLY, directory, *oapl_command(*words)]
        there = run("unshare", "-m", "--propagation", "private", *command)
        assert there.returncode == 0, there.stderr
        assert there.stdout == run(*oapl_command(*words)).stdout


@pytest.fixture
def latin_1(tmp_path):
    """Environment of a terminal that is ISO-8859-1."""
    folder = tmp_path / "locales"
    folder.mkdir()
    words = ("localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1")
    if not shutil.which("localedef") or run(*words).returncode:
        pytest.skip("localedef cannot make en_US.ISO-8859-1 here: it needs the package locales")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}


def test_a_terminal_that_is_not_utf8_trains_and_resumes(train, latin_1, tmp_path):
    """The recipe in the run directory is UTF-8, so the same command finds its own."""
    recipe = tmp_path / "recipe.toml"
    text = (ROOT / "recipes" / "micro_offline.toml").read_text(encoding="utf-8")
    text = text.replace('source = "jsonl"', 'source = "jsonl"\nsystem = "Antworte größer"')
    recipe.write_text(text, encoding="utf-8")
    assert run(*oapl_command("train", "--help"), **latin_1).returncode == 0
    for _ in ("first", "again"):
        done = run(*train(recipe), **latin_1)
        assert done.returncode == 0, done.stderr
    assert "Antworte größer" in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
