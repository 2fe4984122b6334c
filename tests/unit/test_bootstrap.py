"""Set-up on a machine that is not ready says what is missing, in one line, with exit code 2."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("bootstrap", ROOT / ".ci" / "bootstrap.py")
bootstrap = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bootstrap)


def told(capsys, call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_old_or_too_new_python_is_named(capsys):
    assert "Python 3.9 is not supported" in told(capsys, bootstrap.check_python, (3, 9, 1))
    assert "3.11 to 3.14" in told(capsys, bootstrap.check_python, (3, 15, 0))
    bootstrap.check_python((3, 12, 0))


def test_a_short_disk_is_named(capsys):
    assert "1.5 GB are free" in told(capsys, bootstrap.check_disk, 1.5e9, 6)
    bootstrap.check_disk(7e9, 6)


@pytest.mark.live
def test_offline_says_so_and_leaves_no_stamp(tmp_path):
    """The real script on a copy of the tree, with an index that cannot be reached."""
    for name in (".ci", "csrc"):
        os.makedirs(tmp_path / name)
    for name in (".ci/bootstrap.py", "requirements-cpu.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    lines = (tmp_path / "requirements-cpu.txt").read_text().splitlines()
    kept = [line for line in lines if line.startswith("tomli-w")]
    (tmp_path / "requirements-cpu.txt").write_text("\n".join(kept) + "\n")
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "2",
        "PIP_CONFIG_FILE": os.devnull,
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | nowhere
    done = subprocess.run(
        [sys.executable, str(tmp_path / ".ci" / "bootstrap.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "offline" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".venv" / "installed").exists()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "PyTorch's index of CPU wheels"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: a\nERROR: something else", "something else"),
    ],
)
def test_the_reason_is_told_in_words(log, words):
    assert words in bootstrap.reason(log)


def test_a_second_setup_is_a_no_op():
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("this environment was not made by make")
    base = sys._base_executable  # the stamp names the interpreter that make ran
    done = subprocess.run([base, ".ci/bootstrap.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == ""
