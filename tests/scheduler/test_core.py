"""The scheduler's core: Algorithm 1's order, and invariants under any order of events."""

import queue
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oapl_engine.scheduler import core, driver
from oapl_engine.scheduler import events as e


def make(mode="phased", **kw):
    base = dict(mode=mode, steps=8, groups_per_step=2, lag=4, window=1, credit=8)
    base.update(kw)
    return core.State(core.Settings(**base))


class World:
    """Answers every command, in an order drawn from `rng`; remembers what a judge needs."""

    def __init__(self, state, rng, lose=0.0, invalid=0.0):
        self.state, self.rng, self.lose, self.invalid = state, rng, lose, invalid
        self.pending, self.log, self.count, self.code = [], [], 0, None
        self.version_of, self.uses, self.step_of_version, self.serving = {}, {}, {}, -1
        self.in_flight = 0

    def run(self, limit=5000):
        self.pending = [e.EngineReady(0)] if self.state.settings.engine else [e.Tick(0)]
        for _ in range(limit):
            if self.code is not None:
                return self.code
            assert self.pending, f"nothing in flight and no command due: {self.state}"
            event = self.pending.pop(self.rng.randrange(len(self.pending)))
            self.hear(event)
        raise AssertionError("the run does not end")

    def hear(self, event):
        if isinstance(event, (e.GroupDone, e.GroupInvalid)):
            self.in_flight -= 1
        self.log.append(event)
        self.state, commands = core.step(self.state, event)
        for command in commands:
            self.log.append(command)
            self.obey(command)
        s = self.state
        assert s.in_flight == self.in_flight
        assert self.in_flight + len(s.buffer) <= max(s.settings.credit, len(s.buffer))

    def obey(self, command):
        match command:
            case e.Submit(n):
                assert self.serving >= 0, "submitted to an engine that serves nothing"
                for _ in range(n):
                    self.count += 1
                    key = f"g{self.count}"
                    self.version_of[key] = self.serving
                    bad = self.rng.random() < self.invalid
                    self.pending.append(e.GroupInvalid(key, "lost") if bad else e.GroupDone(key, 10, self.serving))
                    self.in_flight += 1
            case e.Train(step, keys):
                assert step == self.state.step + 1
                for key in keys:
                    self.uses[key] = self.uses.get(key, 0) + 1
                    assert self.uses[key] <= self.state.settings.allowance, "a rollout was used twice"
                    lag = step - 1 - self.step_of_version.get(self.version_of.get(key), 0)
                    assert lag < self.state.settings.lag * self.state.settings.window, "lag beyond its bound"
                self.pending.append(e.StepDone(step))
            case e.Publish(version):
                assert version not in self.step_of_version, "a version was reused"
                self.step_of_version[version] = self.state.step
                self.serving = version
                self.pending.append(e.Published(version))
                if self.rng.random() < self.lose:
                    self.lose_engine()
            case e.Sleep():
                self.pending.append(e.Slept())
            case e.Wake(tags) if "weights" in tags:
                self.pending.append(e.Awake())
            case e.Checkpoint(step):
                self.pending.append(e.CheckpointDone(step))
            case e.Evaluate(step):
                self.pending.append(e.EvaluationDone(step))
            case e.Exit(code):
                self.code = code

    def lose_engine(self):
        drop = (e.GroupDone, e.GroupInvalid, e.Published, e.EvaluationDone, e.Slept, e.Awake)
        self.pending = [p for p in self.pending if not isinstance(p, drop)]
        self.serving, self.in_flight = -1, 0
        self.state, commands = core.step(self.state, e.EngineLost(0))
        self.pending.append(e.EngineReady(0))
        for command in commands:
            self.obey(command)


def names(log):
    return [type(x).__name__ for x in log]


def test_phased_is_algorithm_1():
    world = World(make(steps=4, lag=2, credit=4, checkpoint_every=2), random.Random(0))
    assert world.run() == 0
    commands = [x for x in world.log if isinstance(x, e.Command)]
    assert names(commands) == (
        ["Pause", "Publish", "Wake", "Resume", "Evaluate", "Submit", "Sleep", "LoadTrainer", "Train", "Train"]
        + ["Checkpoint", "OffloadTrainer", "Wake", "Pause", "Publish", "Wake", "Resume", "Submit"]
        + ["Sleep", "LoadTrainer", "Train", "Train", "Checkpoint", "OffloadTrainer", "Wake", "Pause", "Publish"]
        + ["Wake", "Resume", "Evaluate", "Exit"]
    )


def test_sync_trains_each_step_on_fresh_weights():
    world = World(make("sync", steps=5, lag=1, credit=2), random.Random(0))
    assert world.run() == 0
    lags = [
        c.step - 1 - world.step_of_version[world.version_of[k]]
        for c in world.log
        if isinstance(c, e.Train)
        for k in c.keys
    ]
    assert lags == [0] * 10


def test_offline_uses_no_engine():
    state = make("offline", steps=4, lag=4, allowance=2, evaluate=False)
    state = replace(state, buffer=tuple(core.Waiting(f"g{i}", 0) for i in range(4)))
    world = World(state, random.Random(0))
    assert world.run() == 0
    kinds = {c for c in names(world.log) if hasattr(e, c)}
    assert kinds == {"Tick", "LoadTrainer", "Train", "StepDone", "Checkpoint", "CheckpointDone", "Exit"}
    assert sorted(world.uses.values()) == [2, 2, 2, 2]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["sync", "phased", "async"]),
    steps=st.integers(1, 12),
    per_step=st.integers(1, 4),
    lag=st.integers(1, 6),
    invalid=st.sampled_from([0.0, 0.3]),
    lose=st.sampled_from([0.0, 0.3]),
    every=st.integers(0, 3),
    extra=st.integers(0, 5),
    on_publish=st.sampled_from(["drain", "abort", "keep"]),
    allowance=st.integers(1, 3),
)
def test_any_order_of_events_ends_the_run(
    seed, mode, steps, per_step, lag, invalid, lose, every, extra, on_publish, allowance
):
    lag = 1 if mode == "sync" else lag
    state = make(
        mode,
        steps=steps,
        groups_per_step=per_step,
        lag=lag,
        credit=lag * per_step + extra,
        evaluate_every=every,
        window=2 if mode == "async" else 1,
        on_publish=on_publish,
        allowance=allowance,
    )
    world = World(state, random.Random(seed), lose, invalid)
    assert world.run() == 0
    assert world.state.step == steps
    assert [c.step for c in world.log if isinstance(c, e.Train)] == list(range(1, steps + 1))


@given(seed=st.integers(0, 2**32), mode=st.sampled_from(["phased", "async"]))
@settings(max_examples=30, deadline=None)
def test_the_same_events_give_the_same_commands(seed, mode):
    first = make(mode, window=2 if mode == "async" else 1)
    world = World(first, random.Random(seed))
    world.run()
    state, replayed = first, []
    for event in (x for x in world.log if not isinstance(x, e.Command)):
        state, commands = core.step(state, event)
        replayed += commands
    assert replayed == [x for x in world.log if isinstance(x, e.Command)]


def test_resume_replays_the_journal_before_anything_else():
    state = make(steps=6, lag=4, credit=8)
    state = replace(
        state,
        step=4,
        published_step=4,
        evaluated=0,
        checkpointed=4,
        next_version=2,
        version_steps=((0, 0), (1, 4)),
        replay=(("a", "b"),),
        buffer=(core.Waiting("c", 1), core.Waiting("d", 1)),
    )
    state, commands = core.step(state, e.EngineReady(0))
    assert commands[0] == e.Sleep(("weights", "kv_cache"))
    state, commands = core.step(state, e.Slept())
    assert commands[-1] == e.Train(5, ("a", "b"))
    state, commands = core.step(state, e.StepDone(5))
    assert commands[-1] == e.Train(6, ("c", "d"))


def test_a_refused_publish_ends_the_run_with_code_3():
    state, _ = core.step(make(), e.EngineReady(0))
    _, commands = core.step(state, e.PublishFailed(0, "lm_head.weight"))
    assert commands == (e.Exit(3),)


def test_stop_checkpoints_first():
    state = replace(make(), step=3, checkpointed=0, doing="train", engine="asleep", loaded=True)
    state, commands = core.step(state, e.Stop())
    assert commands == ()
    state, commands = core.step(state, e.StepDone(4))
    assert commands == (e.Checkpoint(4),)
    _, commands = core.step(state, e.CheckpointDone(4))
    assert commands == (e.Exit(130),)


def test_driver_records_a_stream_that_replays(tmp_path):
    inbox = queue.SimpleQueue()
    answers = {
        e.LoadTrainer: lambda c: None,
        e.Train: lambda c: e.StepDone(c.step),
        e.Checkpoint: lambda c: e.CheckpointDone(c.step),
    }
    state = replace(
        make("offline", steps=2, lag=2, evaluate=False), buffer=tuple(core.Waiting(f"g{i}", 0) for i in range(4))
    )
    inbox.put(e.Tick(0))
    _, code = driver.drive(state, inbox, answers, tmp_path / "events.jsonl")
    assert code == 0
    messages = driver.read_record(tmp_path / "events.jsonl")
    again, replayed = state, []
    for event in (m for m in messages if not isinstance(m, e.Command)):
        again, commands = core.step(again, event)
        replayed += commands
    assert replayed == [m for m in messages if isinstance(m, e.Command)]


@pytest.mark.parametrize("field", ["uses", "lag", "version"])
def test_the_judge_catches_a_planted_bug(field, monkeypatch):
    """Each invariant above can fail: break the core on purpose and watch the judge object."""
    if field == "uses":
        monkeypatch.setattr(core, "_hear", _twice(core._hear))
    elif field == "lag":
        monkeypatch.setattr(core, "_window_over", lambda s: False)
        monkeypatch.setattr(core, "_groups_needed", lambda s: 4)
    else:
        publish = core._publish
        monkeypatch.setattr(core, "_publish", lambda s: _number_zero(*publish(s)))
    with pytest.raises(AssertionError):
        World(make(steps=12, lag=3, credit=12), random.Random(1)).run()


def _number_zero(state, commands):
    return state, tuple(e.Publish(0) if isinstance(c, e.Publish) else c for c in commands)


def _twice(hear):
    def broken(s, event):
        s, commands = hear(s, event)
        if isinstance(event, e.GroupDone):
            s = replace(s, buffer=(*s.buffer, s.buffer[-1]))
        return s, commands

    return broken
