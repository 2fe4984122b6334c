"""Two torchrun ranks over gloo against one: the same gradients, updates and metrics; a rank with nothing to do."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from oapl_engine.distributed import ALONE
from oapl_engine.report.metrics import read_metrics
from oapl_engine.trainer.packing import balance
from tests.conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(ranks, *words, timeout=300):
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(micro_model, micro_rollouts, tmp_path_factory):
    """trained(ranks, …switches): what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")

    def run(ranks, *switches):
        out = folder / "-".join(map(str, (ranks, *switches)))
        if not out.with_name(f"{out.name}.0").exists():
            torchrun(ranks, "tests.support.programs.ranks_program", micro_model, micro_rollouts, out, *switches)
        return [load_file(out.with_name(f"{out.name}.{rank}")) for rank in range(ranks)]

    return run


def difference(found, expected, kind):
    """‖found - expected‖ / ‖expected‖ over all tensors of a kind."""
    names = [name for name in expected if name.startswith(kind)]
    apart = sum((found[n] - expected[n]).double().square().sum() for n in names)
    return float((apart / sum(expected[n].double().square().sum() for n in names)).sqrt())


def test_two_ranks_have_the_gradients_and_updates_of_one(trained, figure):
    (one,), two = trained(1), trained(2)
    gradients = max(difference(found, one, "gradient") for found in two)
    updates = max(difference(found, one, "update") for found in two)
    figure("two ranks against one: step-1 gradients, update after ten steps, relative", [gradients, updates])
    assert gradients <= 1e-5
    assert updates <= 1e-3
    for name in two[0]:
        assert name == "share" or torch.equal(two[0][name], two[1][name]), f"{name}: the ranks went apart"
    assert torch.allclose(two[0]["metrics"], one["metrics"], rtol=1e-3, atol=1e-6)
    tokens = [int(found["share"][1]) for found in two]
    assert abs(tokens[0] - tokens[1]) < 0.2 * sum(tokens), "the ranks do not carry equal tokens"


def test_without_the_reduction_the_gradients_differ(trained):
    """The test above can fail: leave the sum over ranks out."""
    (one,), two = trained(1), trained(2, "8", "no-reduction")
    assert difference(two[0], one, "gradient") > 0.1


def test_a_rank_without_micro_batches_takes_part(trained):
    one, two = trained(1, "1"), trained(2, "1")
    assert [int(found["share"][0] > 0) for found in two] == [1, 0]
    assert difference(two[1], one[0], "gradient") <= 1e-5
    assert difference(two[1], one[0], "update") <= 1e-3


def test_shares_are_nearly_equal_and_complete():
    sizes = [90, 10, 30, 30, 20, 20]
    bins = balance(sizes, 2)
    assert sorted(i for chosen in bins for i in chosen) == list(range(6))
    assert [sum(sizes[i] for i in chosen) for chosen in bins] == [100, 100]
    assert balance([5], 3) == [[0], [], []]
    assert ALONE.gather({"a": [1, None]}) == [{"a": [1, None]}]


@pytest.fixture
def words(micro_model, micro_rollouts, tmp_path):
    fields = {
        "model.path": micro_model, "data.path": micro_rollouts, "run.dir": tmp_path / "run", "schedule.steps": 24,
        "checkpoint.every": 6,
    }  # fmt: skip
    return [str(ROOT / "recipes" / "micro_offline.toml"), *(str(w) for k, v in fields.items() for w in (f"--{k}", v))]


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_and_the_run_goes_on(words, oapl, tmp_path):
    run = tmp_path / "run"
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "oapl_engine.train", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(read_metrics(run / "metrics.jsonl")) < 8:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    psutil.Process(process.pid).children()[-1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 25))
    rows = [json.loads(line) for line in oapl("rollouts", run).stdout.splitlines()]
    assert len(rows) == 48 * 8
    assert max(len(row["trained_steps"]) for row in rows) <= 4, "a rollout was used beyond its max_uses"
    ledger = read_metrics(run / "metrics.jsonl")[-1]["ledger"]
    assert sum(ledger.values()) == read_metrics(run / "metrics.jsonl")[-1]["tokens/generated"]
    refused = oapl("train", *words)
    assert refused.returncode == 2
    assert "was written by 2 ranks, now there are 1" in refused.stderr


@pytest.mark.slow
@pytest.mark.live
def test_two_ranks_with_an_engine_each_train_in_phases(words, micro_model, oapl, tmp_path):
    fields = ["--schedule.steps", "16", "--schedule.lag", "4", "--data.held_out", "16", "--evaluation.n", "2"]
    more = ["--model.path", str(micro_model), "--run.dir", str(tmp_path / "run")]
    done = torchrun(2, "oapl_engine.train", ROOT / "recipes" / "micro.toml", *fields, *more, timeout=600)
    assert done.stdout.splitlines()[-1].startswith("done: steps=16")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["off_policy/max"] for row in rows] == list(range(4)) * 4
    assert max(abs(row["log_ratio/mean"]) for row in rows if row["off_policy/max"] == 0) < 1e-4
    assert sum(rows[-1]["ledger"].values()) == rows[-1]["tokens/engine"]
    exported = [json.loads(line) for line in oapl("rollouts", tmp_path / "run").stdout.splitlines()]
    assert len({row["key"] for row in exported}) == len(exported) == 16 * 8 * 8
    assert max(len(row["trained_steps"]) for row in exported) == 1
