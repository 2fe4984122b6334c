"""`oapl train` in offline mode, end to end, as a user runs it: learns, stops, resumes, refuses."""

import fcntl
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oapl_kernels.objectives import OBJECTIVES
from transformers import AutoModelForCausalLM, AutoTokenizer

from oapl_engine.config import load_recipe
from oapl_engine.distributed import ALONE
from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.learner import Learner
from oapl_engine.orchestrator.run import open_run
from oapl_engine.report.metrics import METRICS, read_metrics
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.train import run_recipe
from oapl_engine.trainer.checkpoint import load_newest
from tests.conftest import ROOT

RECIPE = ROOT / "recipes" / "micro_offline.toml"


@pytest.fixture
def arguments(micro_model, micro_rollouts, tmp_path):
    def build(run="run", **overrides):
        fields = {"model.path": micro_model, "data.path": micro_rollouts, "run.dir": tmp_path / run, "run.threads": 1}
        fields |= {"schedule.steps": 24, **{k.replace("__", "."): v for k, v in overrides.items()}}
        return ["train", RECIPE, *(word for k, v in fields.items() for word in (f"--{k}", v))]

    return build


def test_the_loss_falls_and_the_checkpoint_loads_in_transformers(oapl, arguments, tmp_path, figure):
    done = oapl(*arguments())
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"done: steps=24 pass@1 before=- after=- run={tmp_path / 'run'}"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert all(key in row for row in rows for key in METRICS)
    first, final = (sum(row["loss"] for row in part) / 6 for part in (rows[:6], rows[-6:]))
    figure("loss, first and last epoch", [first, final])
    assert final < 0.9 * first
    assert sum(rows[-1]["ledger"].values()) == rows[-1]["tokens/generated"]
    folder = load_newest(tmp_path / "run" / "checkpoints").path
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == 162_240
    assert len(AutoTokenizer.from_pretrained(folder)) == 32
    again = oapl(*arguments())
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == last
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 24, "a finished run trained again"


def test_export_feeds_another_offline_run(oapl, arguments, tmp_path):
    assert oapl(*arguments(schedule__steps=4)).returncode == 0
    exported = oapl("rollouts", tmp_path / "run", "--format", "jsonl")
    rows = [json.loads(line) for line in exported.stdout.splitlines()]
    assert len(rows) == 48 * 8
    assert {len(row["trained_steps"]) for row in rows} == {0, 1}
    (tmp_path / "again.jsonl").write_text(exported.stdout)
    assert oapl(*arguments("second", data__path=tmp_path / "again.jsonl", schedule__steps=2)).returncode == 0


def test_a_killed_run_resumes_to_the_same_weights(oapl, arguments, tmp_path):
    """SIGKILL between two checkpoints: the same command replays the journal, and the weights agree bit for bit."""
    assert oapl(*arguments("whole", checkpoint__every=10)).returncode == 0
    words = [sys.executable, "-m", "oapl_engine.cli", *map(str, arguments("killed", checkpoint__every=10))]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 14 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 14 <= len(read_metrics(metrics)) < 24
    resumed = oapl(*arguments("killed", checkpoint__every=10))
    assert resumed.returncode == 0
    assert "replayed" not in resumed.stderr, "a replayed step gave other weights than before"
    whole, killed = (load_newest(tmp_path / run / "checkpoints") for run in ("whole", "killed"))
    assert whole.step == killed.step == 24
    assert whole.weight_hash == killed.weight_hash
    rows = [json.loads(r) for r in oapl("rollouts", tmp_path / "killed").stdout.splitlines()]
    assert max(len(row["trained_steps"]) for row in rows) <= 4, "a rollout was used beyond its max_uses"


def test_a_replay_that_gives_other_weights_is_told(oapl, arguments, tmp_path):
    assert oapl(*arguments(schedule__steps=4, checkpoint__every=2)).returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    with sqlite3.connect(tmp_path / "run" / "journal.sqlite") as journal:
        journal.execute("UPDATE step SET weight_hash = 'other' WHERE step = 3 AND state = 'done'")
    resumed = oapl(*arguments(schedule__steps=4, checkpoint__every=2))
    assert resumed.returncode == 0
    assert re.search(r"step 3, replayed, gave weights [0-9a-f]{16} where it gave other before", resumed.stderr)
    assert "step 4, replayed" not in resumed.stderr


def test_a_resumed_learner_knows_the_version_that_serves(arguments, tmp_path):
    words = [str(word) for word in arguments(schedule__steps=1)]
    recipe = load_recipe(words[1], words[2:])
    assert run_recipe(recipe) == 0
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    for version in (0, 3):
        journal.published(version, 1, "hash", 0)
    with open_run(recipe, ALONE) as run:
        Learner.open(run)
        assert (run.step, run.version) == (1, 3)


def test_ctrl_c_leaves_a_checkpoint_and_exits_with_130(oapl, arguments, tmp_path):
    words = [sys.executable, "-m", "oapl_engine.cli", *map(str, arguments(schedule__steps=24))]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr.read()
    stopped = load_newest(tmp_path / "run" / "checkpoints").step
    assert 2 <= stopped < 24
    assert oapl(*arguments()).returncode == 0
    assert load_newest(tmp_path / "run" / "checkpoints").step == 24


def test_the_authors_parquet(oapl, arguments, micro_rollouts, tmp_path):
    """Text columns of the paper's data sets; log-probs are recomputed, the value uses all recorded rewards."""
    rows = [json.loads(line) for line in micro_rollouts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(arguments()[3])
    rewards = {}
    for row in rows:
        rewards.setdefault(row["group"], []).append(row["reward"])
    table = [
        {
            "prompt": tokenizer.decode(row["prompt_token_ids"]),
            "response": tokenizer.decode(row["response_token_ids"], skip_special_tokens=True) or "0",
            "precomputed_reward": row["reward"],
            "response_rewards": rewards[row["group"]],
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "authors.parquet")
    overrides = {"data__source": "parquet", "data__path": tmp_path / "authors.parquet"}
    refused = oapl(*arguments(**overrides))
    assert refused.returncode == 2
    assert 'behavior = "recomputed"' in refused.stderr
    done = oapl(*arguments("recomputed", **overrides, objective__behavior="recomputed", schedule__steps=6))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recomputed" / "behavior" / "step_000000.npz").exists()
    row = read_metrics(tmp_path / "recomputed" / "metrics.jsonl")[0]
    assert abs(row["log_ratio/mean"]) < 1e-6, "before the first step, π is the policy that was rescored"


def file_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def refuse(words, arguments):
    """As the command line does it, without the process: ConfigError is exit code 2 (test_config.py)."""
    with pytest.raises(ConfigError) as error:
        run_recipe(load_recipe(arguments[1], [str(word) for word in arguments[2:]]))
    for word in words:
        assert word in str(error.value)


def test_bad_input_is_refused_and_nothing_is_written_over(refused, oapl, arguments, micro_rollouts, tmp_path):
    refused(["needs 800 groups", "48", "max_uses"], *arguments(schedule__steps=100))
    rows = micro_rollouts.read_text().splitlines()
    for name, change, words in (
        ("nan", {"reward": float("nan")}, "NaN"),
        ("positive", {"behavior_logprobs": [0.5] * 7}, "behavior_logprobs"),
        ("range", {"response_token_ids": [99] * 7}, "99"),
    ):
        broken = {**json.loads(rows[3]), **change}
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([*rows[:3], json.dumps(broken), *rows[4:]]) + "\n")
        refuse([words, "line 4"], arguments(data__path=path))
    refuse(["does not exist"], arguments(data__path="nowhere.jsonl"))
    refuse(["no_such_model"], arguments(model__path="no_such_model"))
    refuse(["did you mean oapl?"], arguments(objective__name="oapll"))
    assert oapl(*arguments(schedule__steps=2)).returncode == 0, "a refused run must not bind its directory"
    before = file_times(tmp_path / "run")
    refuse(
        ["belongs to another recipe", "objective.beta2 was 0.1, now 0.2"],
        arguments(schedule__steps=2, objective__beta2=0.2),
    )
    assert file_times(tmp_path / "run") == before


def test_two_runs_in_one_directory(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuse(["another process runs there"], arguments())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_takes_a_step(name, arguments, tmp_path):
    words = arguments(objective__name=name, schedule__steps=2)
    assert run_recipe(load_recipe(words[1], [str(word) for word in words[2:]])) == 0
    assert all(row["loss"] is not None for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def run(arguments):
    return run_recipe(load_recipe(arguments[1], [str(word) for word in arguments[2:]]))


def rewritten(path, rows, change):
    path.write_text("".join(json.dumps(json.loads(row) | change(json.loads(row))) + "\n" for row in rows))
    return path


def test_a_run_that_learns_nothing_says_why_and_exits_with_3(oapl, arguments, micro_rollouts, tmp_path):
    rows = micro_rollouts.read_text().splitlines()
    path = rewritten(tmp_path / "wrong.jsonl", rows, lambda row: {"reward": 0.0})
    done = oapl(*arguments(data__path=path, schedule__steps=2))
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1].startswith("done: steps=2 ")
    assert "warning: 2 steps in a row trained nothing" in done.stderr
    assert re.search(r"nothing was learned: \d+ of \d+ tokens in dropped:equal_rewards \(all rewards", done.stderr)


def test_a_model_with_two_ends_of_turn_truncates_nothing(arguments, micro_model, micro_rollouts, tmp_path):
    """As Llama-3 has: its generation config names two, and the rollouts end with the second."""
    model = shutil.copytree(micro_model, tmp_path / "two_ends")
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 30]}))
    rows = micro_rollouts.read_text().splitlines()

    def second_end(row):
        return {"response_token_ids": [*row["response_token_ids"][:-1], 30], "finish": None}

    path = rewritten(tmp_path / "second.jsonl", rows, second_end)
    words = {"model__path": model, "data__path": path, "schedule__steps": 1, "objective__overlong": "excluded"}
    assert run(arguments(**words)) == 0
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["is_truncated/mean"] == 0
    assert "dropped:overlong" not in row["ledger"]


def test_a_data_file_that_changed_is_refused_on_resume(arguments, micro_rollouts, tmp_path):
    path = shutil.copy(micro_rollouts, tmp_path / "rollouts.jsonl")
    words = arguments(data__path=path, schedule__steps=2)
    assert run(words) == 0
    rewritten(path, path.read_text().splitlines(), lambda row: {"reward": 1.0 - row["reward"]})
    refuse(["other contents of data.path"], words)
