"""The scheduler's core: Algorithm 1's order, and invariants under any order of events."""

import queue
import random
import threading
import types
from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from oapl_engine.scheduler import core, driver, lockstep
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.buffer import Buffer, BufferedGroup
from oapl_engine.scheduler.state import State
from tests.support.fake_machine import FakeMachine, break_rule, check_run, make_settings, names


def make(mode="phased", **fields):
    return State(make_settings(mode, **fields))


def test_phased_is_algorithm_1():
    machine = FakeMachine(make(steps=4, lag=2, max_groups_ahead=4, checkpoint_every=2), random.Random(0))
    assert machine.run() == 0
    commands = [x for x in machine.log if isinstance(x, e.Command)]
    assert names(commands) == (
        ["Pause", "Publish", "Wake", "Resume", "Evaluate", "Submit", "Sleep", "LoadTrainer", "Train", "Train"]
        + ["Checkpoint", "OffloadTrainer", "Wake", "Pause", "Publish", "Wake", "Resume", "Submit"]
        + ["Sleep", "LoadTrainer", "Train", "Train", "Checkpoint", "OffloadTrainer", "Wake", "Pause", "Publish"]
        + ["Wake", "Resume", "Evaluate", "Exit"]
    )


def test_sync_trains_each_step_on_fresh_weights():
    machine = FakeMachine(make("sync", steps=5, lag=1, max_groups_ahead=2), random.Random(0))
    assert machine.run() == 0
    lags = [
        c.step - 1 - machine.step_of_version[machine.version_of[k]]
        for c in machine.log
        if isinstance(c, e.Train)
        for k in c.keys
    ]
    assert lags == [0] * 10


def test_offline_uses_no_engine():
    state = make("offline", steps=4, lag=4, max_uses=2, evaluate=False)
    state = replace(state, buffer=Buffer(BufferedGroup(f"g{i}", 0) for i in range(4)))
    machine = FakeMachine(state, random.Random(0))
    assert machine.run() == 0
    kinds = {c for c in names(machine.log) if hasattr(e, c)}
    assert kinds == {"Start", "LoadTrainer", "Train", "StepDone", "Checkpoint", "CheckpointDone", "Exit"}
    assert sorted(machine.uses.values()) == [2, 2, 2, 2]


@st.composite
def machines(draw):
    """Any settings, any order of events, engines that die, groups that are invalid or all equal, a stop somewhere."""
    mode = draw(st.sampled_from(["sync", "phased", "async"]))
    on_publish = draw(st.sampled_from(["drain", "abort", "keep"]))
    per_step, lag = draw(st.integers(1, 4)), 1 if mode == "sync" else draw(st.integers(1, 6))
    state = make(
        mode,
        steps=draw(st.integers(1, 12)),
        groups_per_step=per_step,
        lag=lag,
        max_groups_ahead=lag * per_step + draw(st.integers(0, 5)),
        evaluate=draw(st.booleans()),
        evaluate_every=draw(st.integers(0, 3)),
        checkpoint_every=draw(st.integers(0, 3)),
        window=2 if mode == "async" or (mode == "phased" and on_publish == "keep") else 1,
        on_publish=on_publish,
        max_uses=draw(st.integers(1, 3)),
        engines=draw(st.integers(1, 3)),
        resample=draw(st.booleans()),
    )
    rates = [draw(st.sampled_from([0.0, p])) for p in (0.02, 0.3, 0.5, 0.01)]
    return FakeMachine(state, random.Random(draw(st.integers(0, 2**32))), *rates)


@settings(max_examples=400, deadline=None)
@given(machines())
def test_any_order_of_events_keeps_every_promise(machine):
    check_run(machine)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(machines())
def test_ten_thousand_orders_of_events_keep_every_promise(machine):
    check_run(machine)


def test_resume_replays_the_journal_before_anything_else():
    state = make(steps=6, lag=4, max_groups_ahead=8)
    state = replace(
        state,
        step=4,
        published_step=4,
        evaluated=0,
        checkpointed=4,
        next_version=2,
        version_steps=((0, 0), (1, 4)),
        replay=(("a", "b"),),
        buffer=Buffer([BufferedGroup("c", 1), BufferedGroup("d", 1)]),
    )
    state, commands = core.step(state, e.EngineReady(0))
    assert commands[0] == e.Sleep(("weights", "kv_cache"))
    state, commands = core.step(state, e.EngineSlept())
    assert commands[-1] == e.Train(5, ("a", "b"))
    state, commands = core.step(state, e.StepDone(5))
    assert commands[-1] == e.Train(6, ("c", "d"))


def test_a_refused_publish_ends_the_run_with_code_3():
    state, _ = core.step(make(), e.EngineReady(0))
    _, commands = core.step(state, e.PublishFailed(0, "lm_head.weight"))
    assert commands == (e.Exit(3),)


def test_stop_checkpoints_first():
    state = replace(make(), step=3, checkpointed=0, pending="train", engines=frozenset({0}), loaded=True)
    state, commands = core.step(state, e.Stop())
    assert commands == ()
    state, commands = core.step(state, e.StepDone(4))
    assert commands == (e.Checkpoint(4),)
    _, commands = core.step(state, e.CheckpointDone(4))
    assert commands == (e.Exit(130),)


@pytest.mark.parametrize("before", [b"", b'{"at": 1.0, "kind": "ev'], ids=["new", "torn by a kill"])
def test_driver_records_a_stream_that_replays(tmp_path, before):
    (tmp_path / "events.jsonl").write_bytes(before)
    inbox = queue.SimpleQueue()
    answers = {
        e.LoadTrainer: [lambda c: None],
        e.Train: [lambda c: e.StepDone(c.step)],
        e.Checkpoint: [lambda c: e.CheckpointDone(c.step)],
    }
    state = replace(
        make("offline", steps=2, lag=2, evaluate=False), buffer=Buffer(BufferedGroup(f"g{i}", 0) for i in range(4))
    )
    inbox.put(e.Start())
    _, code = driver.drive(state, inbox, answers, tmp_path / "events.jsonl")
    assert code == 0
    messages = [message for _, message in driver.read_record(tmp_path / "events.jsonl")]
    assert driver.replay(state, messages) == [m for m in messages if isinstance(m, e.Command)]


def _clear_nothing(s, group):
    return (s, ()) if core._outside_window(s, group.version) else REAL_GROUP_DONE(s, group)


REAL_GROUP_DONE = core._group_done
PLANTED_BUGS = [  # what check_run must say, the rule of core that is broken, and how
    ("beyond max_uses", core._use_groups, lambda s: (s.buffer.take(s.settings.groups_per_step)[0], s.buffer)),
    ("lag beyond its bound", core._outside_window, lambda s, version: False),
    ("further ahead than max_groups_ahead", core._groups_allowed, lambda s: 99),
    ("in no column of the ledger", core._group_done, _clear_nothing),
    ("miscounted", core._group_ended, lambda s: s),
    ("no command due", core._engine_needed, lambda s: False),
    ("does not replay", core._following_version, lambda s: s.next_version + random.randint(1, 9)),
    ("version was reused", core._following_version, lambda s: s.next_version),
    ("submitted to", core._engine_lost, lambda s, i: replace(s, engines=s.engines - {i}, awake=s.awake - {i})),
    ("at the same time", core._must_offload, lambda s: False),
    ("at the same time", core._must_sleep, lambda s: False),
    ("at the same time", core._must_sleep, lambda s: bool(s.awake) and not s.settings.overlaps),
    ("no command due", core._must_offload, lambda s: s.loaded and not s.settings.overlaps and bool(s.engines)),
    ("without the trainer's state", core._must_load, lambda s: False),
    ("under a running engine", core._pause, lambda s: ()),
    ("slept with groups running", core._pause_to_sleep, lambda s: ()),
    ("an engine that sleeps", core._must_wake, lambda s: False),
    ("a drain that did not wait", core._must_drain, lambda s: False),
    ("ended without a checkpoint", core._not_checkpointed, lambda s: False),
    ("next to generation", core._generating, lambda s: False),
]


@pytest.mark.parametrize(("message", "rule", "wrong"), PLANTED_BUGS)
def test_planted_bug_is_caught(message, rule, wrong, monkeypatch):
    """Each promise can be broken: run a core with one bug, and check_run names it."""
    break_rule(monkeypatch, rule, wrong)

    @settings(max_examples=2000, deadline=None, database=None, phases=[Phase.generate], derandomize=True)
    @given(machines())
    def runs(machine):
        check_run(machine)

    with pytest.raises(AssertionError, match=message):
        runs()


def test_a_buffer_shares_storage_and_never_shows_it():
    """Two futures of one buffer do not see each other, and what was consumed is given back."""
    w = [BufferedGroup(f"g{i}", 0, i % 2) for i in range(9)]
    base = Buffer(w[:2])
    left, right = base.append(w[2]), base.append(w[3])
    assert (list(base), list(left), list(right)) == (w[:2], w[:3], [*w[:2], w[3]])
    taken, rest = left.append(w[4]).take(3)
    assert (taken, list(rest), rest.uses) == (tuple(w[:3]), [w[4]], 0)
    assert rest.append(w[5]).uses == 1
    queue = Buffer()
    for i in range(1000):
        queue = queue.append(BufferedGroup(f"g{i}", 0))
        if i > 10:
            _, queue = queue.take(1)
    assert len(queue) == 11
    assert len(queue._items) < 50


def test_equal_groups_are_resampled_up_to_max_groups_ahead():
    """Equal groups are resampled until a complete credit of them came."""
    state = make(steps=4, lag=2, max_groups_ahead=4, resample=True, evaluate=False)
    for event in (e.EngineReady(0), e.Published(0)):
        state, commands = core.step(state, event)
    assert commands[-1] == e.Submit(4)
    state, commands = core.step(state, e.GroupDone("a", 5, 0, equal=True))
    assert commands == (e.Resample(("a",)), e.Submit(1))
    state, commands = core.step(state, e.GroupDone("b", 5, 0))
    assert commands == ()
    for key in "cdef":
        state, commands = core.step(state, e.GroupDone(key, 5, 0, equal=True))
        assert commands == (e.Resample((key,)), e.Submit(1))
    state, commands = core.step(state, e.GroupDone("g", 5, 0, equal=True))
    assert commands == (), "it goes on with what comes"
    assert [w.key for w in state.buffer] == ["b", "g"]


def test_the_tail_is_kept_for_the_next_phase():
    """Six groups for a phase that trains four: the slowest two pause, sleep with the engine, and go on after."""
    state = make(steps=4, lag=2, max_groups_ahead=6, window=2, on_publish="keep", evaluate=False)
    for event in (e.EngineReady(0), e.Published(0)):
        state, commands = core.step(state, event)
    assert commands[-1] == e.Submit(6)
    for key in "abcd":
        state, commands = core.step(state, e.GroupDone(key, 5, 0))
    assert commands == (e.Pause("keep"), e.Sleep(("weights", "kv_cache")))
    for event in (e.EngineSlept(), e.StepDone(1), e.StepDone(2), e.CheckpointDone(2), e.EngineWoke(), e.Published(1)):
        state, commands = core.step(state, event)
    assert commands[-1] == e.Submit(4), "four more, beside the two that go on"
    assert state.in_flight == 6
    state, _ = core.step(state, e.GroupDone("e", 5, 0))
    assert [w.key for w in state.buffer] == ["e"], "its oldest token is one window old"


def test_what_ranks_answer_together():
    rows = lambda *answers: msgspec.to_builtins(answers)  # noqa: E731
    published, refused = e.Published(3), e.PublishFailed(3, "lm_head.weight")
    assert lockstep.merge_answers(rows(published, published)) == published
    assert lockstep.merge_answers(rows(published, refused)) == refused
    assert lockstep.merge_answers(rows(e.Interrupted(), published)) == published, "those that are left serve"
    assert lockstep.merge_answers(rows(e.Interrupted(), None)) == e.Interrupted()
    assert lockstep.merge_answers(rows(None, None)) is None


def test_ranks_hear_the_same_in_the_same_order():
    """Two ranks meet in rounds; what one hears, both hear, and an empty round is followed by another."""
    inboxes = [queue.SimpleQueue(), queue.SimpleQueue()]
    told, meet = [None, None], threading.Barrier(2)

    def gather(rank):
        def plain(value):
            told[rank] = value
            meet.wait(5)
            everyone = list(told)
            meet.wait(5)
            return everyone

        return plain

    heard = [None, None]

    def listen(rank):
        ranks = types.SimpleNamespace(gather=gather(rank))
        answers = [None, e.Interrupted() if rank else e.EngineSlept()]
        hear = lockstep.lockstep_events(ranks)
        heard[rank] = [hear(inboxes[rank], answers), hear(inboxes[rank], [])]

    inboxes[1].put(e.GroupDone("from1", 5, 0))
    inboxes[0].put(e.GroupDone("from0", 5, 0))
    threads = [threading.Thread(target=listen, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    threading.Timer(0.1, inboxes[1].put, (e.Stop(),)).start()
    for thread in threads:
        thread.join(10)
    first = [e.GroupDone("from0", 5, 0), e.GroupDone("from1", 5, 0), e.EngineSlept()]
    assert heard == [[first, [e.Stop()]]] * 2
