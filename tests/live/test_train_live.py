"""The main job against a live vLLM engine: trains with lag, survives kills, leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from oapl_engine.config import load_recipe
from oapl_engine.report.metrics import METRICS, read_metrics
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.scheduler import driver
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.state import Settings, State
from oapl_engine.trainer.checkpoint import load_newest
from tests.conftest import ROOT

pytestmark = pytest.mark.live
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def words(micro_model, tmp_path):
    fields = {
        "model.path": micro_model, "run.dir": tmp_path / "run", "schedule.steps": 24, "schedule.lag": 8,
        "data.held_out": 16, "evaluation.n": 2, "train.precision": "float32",
    }  # fmt: skip
    return [str(ROOT / "recipes" / "micro.toml"), *(str(w) for k, v in fields.items() for w in (f"--{k}", v))]


def start(words):
    command = [sys.executable, "-m", "oapl_engine.train", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(words):
    process = start(words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


def wait_for_steps(process, run, steps):
    deadline = time.monotonic() + 400
    while len(read_metrics(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)


def family(process):
    return [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]


def leftovers(pids, shm):
    """What a dead run left: its processes, shared memory, temporary folders."""
    alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    folders = [str(p) for pid in pids for p in Path(tempfile.gettempdir()).glob(f"oapl-engine-{pid}-*")]
    return alive + folders + sorted(set(os.listdir("/dev/shm")) - shm)


def assert_nothing_is_left(pids, shm):
    deadline = time.monotonic() + 5
    while (left := leftovers(pids, shm)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def trained_twice(oapl, run):
    rows = [json.loads(line) for line in oapl("rollouts", run).stdout.splitlines()]
    return [row["key"] for row in rows if len(row["trained_steps"]) > 1]


def test_torchrun_trains_with_lag_and_accounts_for_every_token(words, tmp_path, oapl, figure):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, "-m", "oapl_engine.train", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"done: steps=24 pass@1 before=\d\.\d{{4}} after=\d\.\d{{4}} run={tmp_path / 'run'}", last)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 24
    assert all(key in row for row in rows for key in METRICS)
    assert [row["policy_version"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert [row["off_policy/max"] for row in rows] == list(range(8)) * 3
    gap = [max(row[f"logprob_gap/{kind}"] for row in rows) for kind in ("mean", "max")]
    figure("engine against trainer log-probs, fp32: mean, max", gap)
    assert gap[0] <= 2e-5
    assert gap[1] <= 5e-4
    first_step_of_a_window = [abs(row["log_ratio/mean"]) for row in rows if row["off_policy/max"] == 0]
    assert max(first_step_of_a_window) < 1e-4, "fresh rollouts must have the trainer's own log-probs"
    ledger = rows[-1]["ledger"]
    assert sum(ledger.values()) == rows[-1]["tokens/engine"]
    assert ledger["lost"] == 0
    assert trained_twice(oapl, tmp_path / "run") == []
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [(row["step"], row["n"], row["k"]) for row in evaluations] == [(0, 2, 1), (24, 2, 1)]
    messages = [message for _, message in driver.read_record(tmp_path / "run" / "events.jsonl")]
    assert {m.version for m in messages if isinstance(m, e.Published)} == {0, 1, 2, 3}
    assert not any(isinstance(m, e.EngineLost) for m in messages), "one engine process serves all versions"
    state = State(Settings.from_recipe(load_recipe(words[0], words[1:])))
    assert driver.replay(state, messages) == [m for m in messages if isinstance(m, e.Command)], (
        "the recorded events replay"
    )


def test_a_killed_run_leaves_nothing_and_goes_on(words, tmp_path, oapl):
    run, shm = tmp_path / "run", set(os.listdir("/dev/shm"))
    words = [*words, "--train.token_budget", "48"]  # many micro-batches: a step slow enough to be killed in mid-window
    process = start(words)
    wait_for_steps(process, run, 1)
    pids = family(process)
    assert len(pids) > 2
    wait_for_steps(process, run, 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_is_left(pids, shm)
    assert finish(words).startswith("done: steps=24")
    assert_nothing_is_left([], shm)
    assert len(read_metrics(run / "metrics.jsonl")) == 24
    assert trained_twice(oapl, run) == []
    assert (
        json.loads((load_newest(run / "checkpoints").path / "trainer" / "extra.json").read_text())["position"] >= 24 * 8
    )
    versions = [version for version, _ in Journal(run / "journal.sqlite").versions()]
    assert versions == sorted(set(versions)), "versions only grow, also across a resume"


def test_ctrl_c_checkpoints_leaves_nothing_and_goes_on(words, tmp_path, oapl):
    shm = set(os.listdir("/dev/shm"))
    process = start(words)
    wait_for_steps(process, tmp_path / "run", 2)
    pids = family(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr.read()
    assert_nothing_is_left(pids, shm)
    assert load_newest(tmp_path / "run" / "checkpoints").step >= 2
    assert finish(words).startswith("done: steps=24")
    assert trained_twice(oapl, tmp_path / "run") == []


def test_a_second_ctrl_c_ends_a_run_in_one_line(words, tmp_path):
    """While groups are generated: no thread and no event loop prints what its neighbours' end did to it."""
    shm, events = set(os.listdir("/dev/shm")), tmp_path / "run" / "events.jsonl"
    process = start([*words, "--sampling.max_new_tokens", "32"])
    deadline = time.monotonic() + 300
    while not events.exists() or b'"Submit"' not in events.read_bytes():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = family(process)
    process.send_signal(signal.SIGINT)
    while "once more stops immediately" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130, said
    assert [word for word in ("Traceback", "xception", "Error", "socket", "Task was") if word in said] == [], said
    assert_nothing_is_left(pids, shm)


def test_a_dead_engine_is_replaced_and_no_token_is_lost(words, tmp_path, oapl):
    """A dead engine is replaced and the run ends with the accounts right."""
    run = tmp_path / "run"
    process = start([*words, "--sampling.max_new_tokens", "32"])
    deadline = time.monotonic() + 300
    events = run / "events.jsonl"
    while not events.exists() or '"Submit"' not in events.read_text():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    engine = next(p for p in psutil.Process(process.pid).children() if "engine_process" in " ".join(p.cmdline()))
    engine.kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    messages = [message for _, message in driver.read_record(run / "events.jsonl")]
    assert any(isinstance(m, e.EngineLost) for m in messages)
    assert sum(isinstance(m, e.EngineReady) for m in messages) == 2
    lost = next(i for i, m in enumerate(messages) if isinstance(m, e.EngineLost))
    back = next(i for i, m in enumerate(messages) if isinstance(m, e.EngineReady) and i > lost)
    assert not any(isinstance(m, e.GroupInvalid) for m in messages[:lost]), "a group was lost before its engine"
    assert not any(isinstance(m, e.Submit) for m in messages[lost:back]), "prompts were given to a dead engine"
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == 24
    assert all(tokens >= 0 for tokens in last["ledger"].values())
    assert trained_twice(oapl, run) == []


def test_async_overlaps_and_keeps_its_lag_bound(words, tmp_path, oapl):
    """Two windows of 8 steps: a step may train on what was sampled up to 2L steps ago."""
    assert finish([*words, "--schedule.mode", "async"]).startswith("done: steps=24")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(row["off_policy/max"] for row in rows) < 16
    assert trained_twice(oapl, tmp_path / "run") == []
    messages = [message for _, message in driver.read_record(tmp_path / "run" / "events.jsonl")]
    first_step = next(i for i, m in enumerate(messages) if isinstance(m, e.StepDone))
    assert any(isinstance(m, e.GroupDone) for m in messages[first_step:]), "groups arrive while steps are trained"


@pytest.mark.slow
def test_ten_dead_engines_are_noticed_and_replaced(words, tmp_path, oapl, figure):
    """SIGKILL in the middle of generation, ten times in one run, in as many windows."""
    run = tmp_path / "run"
    more = {"schedule.lag": 2, "schedule.groups_per_step": 64, "sampling.max_new_tokens": 32, "evaluation.n": 0}
    process = start([*words, *(str(w) for k, v in more.items() for w in (f"--{k}", v))])
    noticed, submits = [], 0
    deadline = time.monotonic() + 1200
    while len(noticed) < 10:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        messages = read_messages(run)
        if sum(isinstance(m, e.Submit) for m in messages) > submits and isinstance(messages[-1], e.Submit):
            found = [p for p in psutil.Process(process.pid).children() if "engine_process" in " ".join(p.cmdline())]
            killed = time.time()
            found[0].kill()
            while not (lost := [at for at, m in lost_since(run, killed)]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            noticed.append(lost[0] - killed)
            submits = sum(isinstance(m, e.Submit) for m in read_messages(run)) + 1
        time.sleep(0.01)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    figure("engine SIGKILLed ten times: seconds until the scheduler heard, largest", max(noticed))
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == 24
    ledger = last["ledger"]
    assert all(tokens >= 0 for tokens in ledger.values())
    assert sum(ledger.values()) == max(last["tokens/engine"], last["tokens/generated"] + ledger["evaluation"])
    assert ledger["trained"] > 0
    assert trained_twice(oapl, run) == []
    messages = read_messages(run)
    assert driver.replay(State(Settings.from_recipe(load_recipe(run / "config.toml"))), messages) == [
        m for m in messages if isinstance(m, e.Command)
    ]


def read_messages(run):
    record = run / "events.jsonl"
    return [message for _, message in driver.read_record(record)] if record.exists() else []


def lost_since(run, when):
    return [(at, m) for at, m in driver.read_record(run / "events.jsonl") if isinstance(m, e.EngineLost) and at >= when]
