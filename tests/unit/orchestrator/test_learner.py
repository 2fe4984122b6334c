"""Learner: a step is journalled before and after, replays give the same weights, checkpoints hold the position."""

import pytest
import torch

from oapl_engine.distributed import Ranks
from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator import learner as learner_module
from oapl_engine.orchestrator.learner import Learner
from oapl_engine.report.metrics import read_metrics
from oapl_engine.scheduler import events as e
from oapl_engine.trainer import offload
from tests.support.rollouts import random_group

KEYS = ("0.p0.0", "0.p1.0")


@pytest.fixture
def make_learner(make_run):
    def make(*overrides, ranks=None):
        run = make_run(*overrides)
        for number in range(2):
            run.log.append(random_group(number, 5, [4, 6, 3], rewards=[1.0, 0.0, 0.5]))
        if ranks:
            run.ranks = ranks
        return Learner.open(run)

    return make


def weights(learner):
    return {name: p.detach().clone() for name, p in learner.policy.trainable().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_is_journalled_and_measured(make_learner):
    learner = make_learner()
    before = weights(learner)
    answer = learner.train(e.Train(1, KEYS))
    run = learner.run
    assert answer.step == run.step == 1
    assert answer.kl == pytest.approx(-read_metrics(run.directory / "metrics.jsonl")[0]["log_ratio/mean"])
    assert not equal(before, weights(learner))
    assert [(step.step, step.groups) for step in run.journal.steps()] == [(1, KEYS)]
    assert set(run.journal.uses()) == {f"{key}.{i}" for key in KEYS for i in range(3)}
    (row,) = read_metrics(run.directory / "metrics.jsonl")
    assert (row["step"], row["policy_version"], row["off_policy/max"]) == (1, 0, 0)
    assert row["ledger"]["trained"] == 2 * (4 + 6 + 3)


def test_intent_is_written_before_the_weights_change(make_learner, monkeypatch):
    learner = make_learner()

    def fails(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(learner, "_optimize", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        learner.train(e.Train(1, KEYS))
    assert [(step.step, step.groups) for step in learner.run.journal.steps()] == [(1, KEYS)]
    assert learner.run.journal.uses() == {}


def test_groups_of_equal_rewards_leave_the_weights(make_run):
    """The step counts; the rollouts end in the column of the rule that dropped them."""
    run = make_run()
    run.log.append(random_group(0, 5, [4, 6], rewards=[1.0, 1.0]))
    learner = Learner.open(run)
    before = weights(learner)
    assert learner.train(e.Train(1, KEYS[:1])) == e.StepDone(1, None)
    assert equal(before, weights(learner))
    assert set(run.journal.dispositions()) == {"0.p0.0.0", "0.p0.0.1"}


def test_a_window_that_trains_nothing_is_warned_of_once(make_run, capsys):
    """The reason comes from the ledger, and the end of the run repeats it."""
    run = make_run("--schedule.lag", 2)
    for number in range(3):
        run.log.append(random_group(number, 5, [4, 6], rewards=[1.0, 1.0]))
    learner = Learner.open(run)
    said = []
    for number in range(3):
        learner.train(e.Train(number + 1, (f"0.p{number}.0",)))
        said.append(capsys.readouterr().err.count("trained nothing"))
    assert said == [0, 1, 0]
    assert "in dropped:equal_rewards (all rewards of a group are equal" in learner.why_untrained()


def test_a_run_that_trained_has_nothing_to_explain(make_learner):
    learner = make_learner()
    learner.train(e.Train(1, KEYS))
    assert learner.idle_steps == 0
    assert learner.why_untrained() is None


def test_a_resumed_learner_continues_from_its_checkpoint(make_learner, capsys):
    learner = make_learner()
    learner.train(e.Train(1, KEYS))
    learner.run.position = 17
    assert learner.checkpoint(e.Checkpoint(1)) == e.CheckpointDone(1)
    learner.train(e.Train(2, KEYS))
    after = weights(learner)

    run = learner.run
    run.step, run.position = 0, 0
    resumed = Learner.open(run)
    assert (run.step, run.position) == (1, 17)
    resumed.train(e.Train(2, KEYS))
    assert equal(after, weights(resumed))
    assert "replayed" not in capsys.readouterr().err


def test_a_replay_with_other_weights_is_reported(make_learner, monkeypatch):
    learner = make_learner()
    said = []
    monkeypatch.setattr(learner.run.display, "say", said.append)
    learner.train(e.Train(1, KEYS))
    with torch.no_grad():
        next(iter(learner.policy.trainable().values())).mul_(1.5)
    learner.train(e.Train(1, KEYS))
    assert any("step 1, replayed, gave weights" in line for line in said)


def test_another_number_of_ranks_is_refused(make_learner):
    learner = make_learner()
    learner.checkpoint(e.Checkpoint(1))
    learner.run.ranks = Ranks(0, 2)
    with pytest.raises(ConfigError, match=r"written by 1 ranks, now there are 2: .* --nproc-per-node 1"):
        Learner.open(learner.run)


def test_only_rank_0_writes_metrics(make_learner):
    assert make_learner(ranks=Ranks(1, 2)).metrics is None


def test_the_reference_is_the_start_model(make_learner):
    """objective.reference_coefficient loads it at the first step that needs it, and never trains it."""
    learner = make_learner("--objective.reference_coefficient", 0.1)
    start = weights(learner)
    assert learner.reference is None
    learner.train(e.Train(1, KEYS))
    assert equal(start, dict(learner.reference.model.named_parameters()))


def test_the_reference_leaves_the_device_too(make_learner, monkeypatch):
    """What stays there is missing when the engine takes its memory back. Bytes are counted, on one device here."""
    moved = []
    monkeypatch.setattr(offload, "move_tensor", lambda tensor, device: moved.append((device, tensor.nbytes)) or tensor)
    monkeypatch.setattr(learner_module, "attention_kernel", lambda attention, device, dtype: (attention, device.type))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    learner = make_learner("--objective.reference_coefficient", 0.1)
    learner.train(e.Train(1, KEYS))
    policies = (learner.policy, learner.reference)
    parameters = sum(p.nbytes for p in learner.reference.model.parameters())
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        moved.clear()
        learner._move(device)
        assert sum(size for where, size in moved if where == device) >= (1 + 2 + 1) * parameters, "with two moments"
        assert {policy.device for policy in policies} == {device}
        assert {policy.kernel[1] for policy in policies} == {device.type}
        count = len(moved)
        learner._move(device)
        assert len(moved) == count, "it is there already"
