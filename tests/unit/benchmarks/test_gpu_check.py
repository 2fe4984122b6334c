"""benchmarks/gpu_check.py as a GPU machine runs it: a copy outside the package. Dry here: small, on CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

STAGES = ("kernels", "weights", "nccl", "trainer", "speed")


@pytest.fixture
def check(tmp_path):
    """check(stage, …, DRY=…) → CompletedProcess; rows are in tmp_path."""
    program = tmp_path / ".gpu" / "gpu_check.py"
    program.parent.mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu_check.py", program)

    def run(*stages, dry):
        paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "OUT": str(tmp_path), "DRY": dry}
        return subprocess.run(
            [sys.executable, str(program), *stages], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.live
def test_dry_run_of_all_stages_writes_good_rows(check, tmp_path):
    done = check(dry="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if row["stage"].endswith(" done")] == [f"{name} done" for name in STAGES]
    assert not [row for row in rows if row.get("error") or row.get("failed") or row.get("failures")]
    of_stage = {row["stage"]: row for row in rows}
    assert of_stage["kernels"]["comparisons"] == 6
    assert of_stage["weights"]["identical"]
    assert of_stage["weights"]["refused"].startswith("WeightMismatchError: embed: expected checksum")
    assert of_stage["nccl"]["intact"]
    assert of_stage["offload"]["same"]
    assert of_stage["restore"]["steps_again"]
    assert [row["gradient_off_first_row"] < 0.05 for row in rows if row["stage"] == "trainer"] == [True] * 4


def test_unknown_stage_is_refused(check):
    done = check("kernel", dry="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: unknown stage kernel; there are: {', '.join(STAGES)}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(check):
    done = check(dry="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no CUDA device here; DRY=1 runs the stages small, on CPU\n"
