"""A disk that fills while a run is written: one line names it, exit code 1, and the same command finishes later."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.live
SLOW = pytest.mark.slow
# in a mount namespace of its own: a small disk, a run, room, the same run
SCRIPT = """
mount -t tmpfs -o size=${1}k tmpfs "$0" || exit 99
"${@:2}"; echo "first rc=$?"
mount -o remount,size=256m "$0"
"${@:2}"; echo "again rc=$?"
"""


@pytest.fixture
def train_on_a_small_disk(tmp_path):
    """train_on_a_small_disk(KiB, words of `oapl train`): the two exit codes, stderr, stdout."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("unshare -m is not allowed here: it needs root")
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(size, *words):
        command = [
            sys.executable,
            "-m",
            "oapl_engine.cli",
            "train",
            *words,
            "--run.dir",
            disk / "run",
            "--run.threads",
            1,
        ]
        shell = ["unshare", "-m", "--propagation", "private", "bash", "-c", SCRIPT, disk, size, *command]
        done = subprocess.run(list(map(str, shell)), cwd=ROOT, capture_output=True, encoding="utf-8", env=os.environ)
        codes = [int(line.rpartition("=")[2]) for line in done.stdout.splitlines() if " rc=" in line]
        return codes, done.stderr, done.stdout

    return run


def check(codes, errors, output):
    assert codes == [1, 0], errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "is full: free some space" in lines[0] or "No space left on device" in lines[0]
    assert "/disk/run" in lines[0]
    assert output.splitlines()[-2].startswith("done: ")


@pytest.mark.parametrize(
    "size", [16, 200, 3500, *(pytest.param(n, marks=SLOW) for n in (64, 400, 700, 1200, 2000, 5000, 7000))]
)
def test_an_offline_run_on_a_full_disk(train_on_a_small_disk, micro_model, micro_rollouts, size):
    words = ["--model.path", micro_model, "--data.path", micro_rollouts, "--schedule.steps", 8, "--checkpoint.every", 2]
    check(*train_on_a_small_disk(size, "recipes/micro_offline.toml", *words))


@pytest.mark.parametrize(
    "size", [128, *(pytest.param(n, marks=SLOW) for n in (32, 300, 600, 1000, 1600, 2500, 2000, 3000, 4000))]
)
def test_a_run_with_an_engine_on_a_full_disk(train_on_a_small_disk, micro_model, size):
    small = {"steps": 4, "lag": 2, "groups_per_step": 4}
    words = [word for name, value in small.items() for word in (f"--schedule.{name}", value)]
    words += ["--data.held_out", 8, "--evaluation.n", 2, "--weights.probe_prompts", 1, "--model.path", micro_model]
    check(*train_on_a_small_disk(size, "recipes/micro.toml", *words))
