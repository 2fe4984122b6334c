"""A program ends with the right code and one line, whatever its terminal, its pipes and Python's options are."""

import subprocess
import sys

import pytest

from oapl_engine.errors import BAD_INPUT, FAILED, INTERRUPTED, ConfigError, RunError, guarded, load_object
from oapl_engine.rollout_log.database import CorruptLogError
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from tests.conftest import ROOT
from tests.support.rollouts import plain_group

SPEAK = "import sys; from oapl_engine.errors import guarded; sys.exit(guarded(lambda: print({text!a}) or 0))"


def python(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


@pytest.fixture
def run(tmp_path):
    """A run directory whose export does not fit into a pipe."""
    Journal(tmp_path / "journal.sqlite").close()
    log = RolloutLog(tmp_path / "rollouts" / "rank0.sqlite")
    for name in range(40):
        log.append(plain_group(name, n=12))
    log.close()
    return tmp_path


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("bad"), BAD_INPUT, "error: bad\n"),
        (CorruptLogError("old"), BAD_INPUT, "error: old\n"),
        (RunError("over"), FAILED, "error: over\n"),
        (KeyboardInterrupt(), INTERRUPTED, "stopped\n"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(error, code, said, capsys):
    def work():
        raise error

    assert guarded(work) == code
    assert capsys.readouterr().err == said


def test_an_error_of_another_pipe_is_not_hidden():
    def work():
        raise BrokenPipeError("an engine's")

    with pytest.raises(BrokenPipeError, match="an engine's"):
        guarded(work)


@pytest.mark.parametrize("arguments", [["rollouts", "{run}"], ["configuration"], ["--version"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(run, arguments):
    """Also where the output fits into the buffer and is written when Python ends."""
    words = [word.format(run=run) for word in arguments]
    process = python("-m", "oapl_engine.cli", *words, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", [["rollouts", "{run}"], ["configuration"]])
def test_output_that_cannot_be_written_is_one_line(run, arguments):
    words = [word.format(run=run) for word in arguments]
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "oapl_engine.cli", *words]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        process = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert process.returncode == FAILED
    assert process.stderr == b"error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("line", ["raise SystemExit(0)", "raise RuntimeError", "1 / 0", "def f(:"])
def test_a_module_that_ends_python_does_not_end_the_program(monkeypatch, tmp_path, line):
    """A script without `if __name__ == "__main__"` would end a run with exit code 0 before it starts."""
    (tmp_path / "own_script.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r'reward\.name = "own_script:score": own_script fails when imported:'):
        load_object("own_script:score", "reward.name")


def test_a_character_that_the_terminal_lacks_is_replaced():
    process = python("-c", SPEAK.format(text="β2 ± 1"), PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"?2 ? 1\n", b"", 0)


def test_help_needs_neither_utf8_nor_docstrings(oapl):
    assert oapl("train", "--help", PYTHONIOENCODING="ascii").returncode == 0
    plain = oapl("train", "--help", PYTHONOPTIMIZE="2")
    assert plain.returncode == 0, plain.stderr
    assert "--schedule.lag (" in plain.stdout


@pytest.mark.parametrize("words", [["train", "micro_offline.toml"], ["sft", "micro_sft.toml"]])
def test_an_interpreter_without_docstrings_is_named(oapl, words):
    """transformers fails while it is imported there."""
    done = oapl(words[0], ROOT / "recipes" / words[1], PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr.startswith("error: transformers cannot be imported under python -OO")
