"""What the version before names and formats changed computed, decided and stored: tests/support/record_golden.py."""

import gzip
import hashlib
import json
import re
import shutil
import sqlite3

import msgspec
import pytest
import torch

from oapl_engine import train
from oapl_engine.config import load_recipe
from oapl_engine.report.metrics import read_metrics
from oapl_engine.rollout_log.database import CorruptLogError
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.scheduler import core
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.buffer import Buffer, BufferedGroup
from oapl_engine.scheduler.state import Settings, State
from tests.conftest import ROOT
from tests.support.record_golden import OBJECTIVES, head_values, instruction_set

GOLDEN = ROOT / "tests" / "unit" / "golden"
HEAD = json.loads((GOLDEN / "head.json").read_text())
OFFLINE = json.loads((GOLDEN / "offline.json").read_text())
WIDTHS = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(stored):
    """Values as they were: bit for bit where they were recorded on this instruction set, else to 1e-5."""
    exact = stored["instruction_set"] == instruction_set()
    return (lambda value: value) if exact else (lambda value: pytest.approx(value, rel=1e-5, abs=1e-5))


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("path", ["fused_policy_loss", "linear_logprob"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_gives_the_recorded_values(path, name, dtype):
    found, stored = head_values(path, name, WIDTHS[dtype]), HEAD["values"][f"{path} {name} {dtype}"]
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        assert found[key] == same(HEAD)(value), key


def recorded_runs():
    """(settings, state at the start, messages in order) of each recorded run of the scheduler."""
    for line in gzip.decompress((GOLDEN / "scheduler.jsonl.gz").read_bytes()).splitlines():
        run = msgspec.json.decode(line)
        left = run["state"] | {"buffer": Buffer(BufferedGroup(*group) for group in run["state"]["buffer"])}
        left["version_steps"] = tuple(map(tuple, left["version_steps"]))
        left["replay"] = tuple(map(tuple, left["replay"]))
        yield State(Settings(**run["settings"]), **left), msgspec.convert(run["messages"], list[e.ANY])


def test_scheduler_gives_the_recorded_commands():
    """200 runs over modes, drain, abort and keep, several uses, lost engines, stops, and continued runs.

    OffloadTrainer may come earlier than it did: it no longer waits for an engine that died, which waits for it.
    """
    runs = list(recorded_runs())
    assert len(runs) == 200
    for number, (state, messages) in enumerate(runs):
        given, offloads = [], 0
        for message in messages:
            if isinstance(message, e.OffloadTrainer):
                offloads -= 1
                assert offloads >= 0, f"run {number} at step {state.step}: the trainer stayed"
                continue
            if isinstance(message, e.Command):
                assert given, f"run {number} at step {state.step}: nothing where {message} was recorded"
                assert given.pop(0) == message, f"run {number} at step {state.step}"
                continue
            assert not given, f"run {number}: {given} before {message} where nothing was recorded"
            state, commands = core.step(state, message)
            given = [command for command in commands if not isinstance(command, e.OffloadTrainer)]
            offloads += len(commands) - len(given)
        assert offloads <= 1, f"run {number}: the trainer left {offloads} times more"
        assert not given, f"run {number} ends with {given}, which was not recorded"


def offline_recipe(directory):
    fields = {"model.path": GOLDEN / "start_model", "run.dir": directory, "run.threads": 1}
    fields |= {"train.precision": "float32", "schedule.steps": 6, "checkpoint.every": 3, "checkpoint.keep": 2}
    fields["data.path"] = ROOT / "experiments" / "data" / "micro_sort6_rollouts.jsonl"
    words = (word for field, value in fields.items() for word in (f"--{field}", str(value)))
    return load_recipe(ROOT / "recipes" / "micro_offline.toml", list(words))


def weight_hashes(directory):
    with sqlite3.connect(directory / "journal.sqlite") as journal:
        rows = journal.execute("SELECT step, weight_hash FROM step WHERE state = 'done'")
        return {str(step): weight_hash for step, weight_hash in rows}


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("golden") / "run"
    assert train.run_recipe(offline_recipe(directory)) == 0
    return directory


def test_offline_run_gives_the_recorded_metrics_and_weights(offline_run):
    if OFFLINE["instruction_set"] == instruction_set():
        assert weight_hashes(offline_run) == OFFLINE["weight_hash"]
    rows = read_metrics(offline_run / "metrics.jsonl")
    assert len(rows) == len(OFFLINE["metrics"]) == 6
    for row, stored in zip(rows, OFFLINE["metrics"], strict=True):
        for name, value in stored.items():
            assert row[name] == same(OFFLINE)(value), (row["step"], name)


def test_run_continues_from_the_recorded_checkpoint(offline_run, tmp_path):
    """Step 3 as the old version wrote it, and the journal that says what steps 4 to 6 trained."""
    directory = tmp_path / "run"
    shutil.copytree(offline_run, directory)
    shutil.rmtree(directory / "checkpoints")
    shutil.copytree(GOLDEN / "step_000003", directory / "checkpoints" / "step_000003")
    with sqlite3.connect(directory / "journal.sqlite") as journal:
        journal.execute("DELETE FROM step WHERE state = 'done' AND step > 3")
    assert weight_hashes(directory).keys() == {"1", "2", "3"}
    assert train.run_recipe(offline_recipe(directory)) == 0
    if OFFLINE["instruction_set"] == instruction_set():
        assert weight_hashes(directory) == OFFLINE["weight_hash"]
    last = read_metrics(directory / "metrics.jsonl")[-1]
    assert last["loss"] == same(OFFLINE)(OFFLINE["metrics"][-1]["loss"])


def test_run_directory_of_the_old_version_is_refused(tmp_path, capsys):
    directory = tmp_path / "old_run"
    shutil.copytree(GOLDEN / "old_run", directory)

    def contents():
        files = (path for path in sorted(directory.rglob("*")) if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    words = ["--run.dir", str(directory), "--model.path", str(GOLDEN / "start_model")]
    assert train.main([str(ROOT / "recipes" / "micro_offline.toml"), *words]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: run.dir = {directory} was written by another version of oapl-engine")
    assert "start in a new --run.dir" in message
    assert contents() == before


@pytest.mark.parametrize(("file", "opened"), [("journal.sqlite", Journal), ("rollouts/rank0.sqlite", RolloutLog)])
def test_database_of_the_old_version_is_refused(tmp_path, file, opened):
    """By its schema's number, also where no config.toml says who wrote it."""
    path = tmp_path / "old.sqlite"
    shutil.copy(GOLDEN / "old_run" / file, path)
    with pytest.raises(CorruptLogError, match=rf"{re.escape(str(path))} has schema 1, .* run.dir"):
        opened(path)
    assert path.read_bytes() == (GOLDEN / "old_run" / file).read_bytes()


def test_old_databases_without_a_recipe_are_bad_input(tmp_path, capsys):
    directory = tmp_path / "old_run"
    shutil.copytree(GOLDEN / "old_run", directory)
    (directory / "config.toml").unlink()
    words = ["--run.dir", str(directory), "--model.path", str(GOLDEN / "start_model")]
    assert train.main([str(ROOT / "recipes" / "micro_offline.toml"), *words]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: {directory / 'journal.sqlite'} has schema 1")
