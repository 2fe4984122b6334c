"""Generator: its share of the prompts, groups durable before they are reported, an engine that dies."""

import json
import os
import queue
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from oapl_engine import config
from oapl_engine.distributed import Ranks
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.inference.client import EngineLostError
from oapl_engine.inference.protocol import Sampling
from oapl_engine.orchestrator import generator as generator_module
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.generator import Generator, context_length, report_dropped
from oapl_engine.rollout.session import engine_cores
from oapl_engine.samples import Group, Prompt, Span, make_rollout
from oapl_engine.scheduler import events as e

SAMPLING = Sampling(max_new_tokens=8)


class Order:
    """Prompt "p{i}" at position i."""

    def prompt(self, position):
        return Prompt(f"p{position}", np.array([3, 4], np.int32), "t")

    def epoch(self, position):
        return 0


class FakeSession:
    """Keeps what it was asked to do; `lost`: every call finds its engine dead."""

    def __init__(self):
        self.incarnation = 0
        self.submitted = []
        self.done = []
        self.lost = False
        self.control = SimpleNamespace(pause=lambda mode: self._do("pause", mode), resume=lambda: self._do("resume"))

    def submit(self, prompt, key, group_size, sampling, on_group):
        self.submitted.append((key, group_size, sampling.max_new_tokens))

    def sleep(self, tags):
        self._do("sleep", *tags)

    def wake(self, tags):
        self._do("wake", *tags)

    def counters(self):
        self._do("counters")
        return {"incarnation": self.incarnation, "tokens_generated": 40}

    def confirm_healthy(self):
        self.done.append(("healthy",))

    def _do(self, *what):
        if self.lost:
            raise EngineLostError("gone")
        self.done.append(what)


@pytest.fixture
def make_generator(make_run):
    def make(ranks=None):
        run = make_run()
        if ranks:
            run.ranks = ranks
        session = FakeSession()
        return Generator(run, session, EngineEvents(queue.SimpleQueue(), 0), Order(), SAMPLING), session

    return make


def inbox(generator):
    found = []
    while not generator.events.inbox.empty():
        found.append(generator.events.inbox.get())
    return found


def group_of(key, statuses, version=0, rewards=(1.0, 0.0, 1.0)):
    prompt = Prompt(key.split(".")[1], np.array([3, 4], np.int32), "t")
    rollouts = tuple(
        make_rollout(
            prompt,
            key,
            i,
            np.array([5, 2]),
            -0.5,
            spans=(Span(version, 0, 2),),
            finish="stop",
            status=status,
            reward=rewards[i] if status == "scored" else None,
            finished_ns=1,
        )
        for i, status in enumerate(statuses)
    )
    return Group(key, prompt, rollouts, version)


def test_a_submit_admits_prompts_in_order(make_generator):
    generator, session = make_generator()
    generator.submit(e.Submit(2))
    assert session.submitted == [("0.p0.0", 8, 8), ("0.p1.0", 8, 8)]


def test_a_submit_is_dealt_to_all_ranks_whose_engine_serves(make_run):
    run = make_run()
    generators = []
    for rank in range(3):
        other = replace(run, ranks=Ranks(rank, 3))
        generators.append(
            (
                Generator(other, session := FakeSession(), EngineEvents(queue.SimpleQueue(), rank), Order(), SAMPLING),
                session,
            )
        )

    def shares(command):
        before = [len(session.submitted) for _, session in generators]
        for generator, _ in generators:
            generator.submit(command)
        return [len(session.submitted) - n for (_, session), n in zip(generators, before, strict=True)]

    assert shares(e.Submit(4)) == [2, 1, 1]
    assert shares(e.Submit(2)) == [0, 1, 1]
    assert shares(e.Submit(5, without=(1,))) == [3, 0, 2]
    keys = [key for _, session in generators for key, *_ in session.submitted]
    assert len(set(keys)) == len(keys) == 11, "no prompt is generated twice"


def test_a_group_is_durable_before_it_is_reported(make_generator):
    generator, session = make_generator()
    generator.submit(e.Submit(1))
    stored = []
    generator.events.inbox = SimpleNamespace(put=lambda event: stored.append((event, generator.run.log.group_keys())))
    generator._on_group(group_of("0.p0.0", ["scored"] * 3))
    ((event, keys),) = stored
    assert keys == ["0.p0.0"]
    assert (event.key, event.tokens, event.version, event.equal) == ("0.p0.0", 6, 0, False)
    assert session.done == [("healthy",)]


def test_equal_rewards_are_reported(make_generator):
    generator, _ = make_generator()
    generator.submit(e.Submit(1))
    generator._on_group(group_of("0.p0.0", ["scored"] * 3, rewards=(1.0, 1.0, 1.0)))
    (event,) = inbox(generator)
    assert event.equal


def test_a_group_with_one_reward_is_invalid(make_generator):
    """Its scored rollout ends in the ledger's column of groups that are too small."""
    generator, _ = make_generator()
    generator.submit(e.Submit(1))
    generator._on_group(group_of("0.p0.0", ["scored", "invalid"]))
    assert inbox(generator) == [e.GroupInvalid("0.p0.0", "1 of 2 rollouts scored")]
    assert generator.run.journal.dispositions() == {"0.p0.0.0": "dropped:group_too_small"}


def test_a_lost_group_is_retried_once(make_generator):
    """The engine's death is reported first, once per engine, and the prompt comes back under a new key."""
    generator, session = make_generator()
    generator.submit(e.Submit(2))
    generator._on_group(group_of("0.p0.0", ["lost", "lost"]))
    generator._on_group(group_of("0.p1.0", ["lost", "lost"]))
    lost, first, second = inbox(generator)
    assert lost == e.EngineLost(0)
    assert [first, second] == [e.GroupInvalid(f"0.p{i}.0", "its engine died") for i in range(2)]
    session.incarnation = 1
    generator.submit(e.Submit(3))
    assert [key for key, *_ in session.submitted[2:]] == ["0.p0.1", "0.p1.1", "0.p2.0"]
    generator._on_group(group_of("0.p0.1", ["lost", "lost"]))
    generator.submit(e.Submit(1))
    assert session.submitted[-1][0] == "0.p3.0", "a prompt that kills two engines is not tried again"


def test_the_position_is_the_first_unfinished_prompt(make_generator):
    generator, _ = make_generator()
    generator.submit(e.Submit(3))
    generator._on_group(group_of("0.p0.0", ["scored"] * 2))
    generator._on_group(group_of("0.p2.0", ["scored"] * 2))
    generator.keep_position(e.Checkpoint(1))
    assert generator.run.position == 1


def test_a_resumed_run_passes_over_what_its_log_holds(make_run):
    run = make_run()
    run.log.append(group_of("0.p0.0", ["scored"] * 2))
    session = FakeSession()
    Generator(run, session, EngineEvents(queue.SimpleQueue(), 0), Order(), SAMPLING).submit(e.Submit(1))
    assert session.submitted[0][0] == "0.p1.0"


def test_a_version_from_the_future_is_refused_before_it_is_logged(make_generator):
    generator, _ = make_generator()
    generator.submit(e.Submit(1))
    with pytest.raises(RunError, match=r"group 0\.p0\.0 holds tokens of version 4.*published is 0"):
        generator._on_group(group_of("0.p0.0", ["scored"] * 2, version=4))
    assert generator.run.log.group_keys() == []


def test_a_dead_engine_interrupts_sleep_and_wake(make_generator):
    generator, session = make_generator()
    assert generator.sleep(e.Sleep(("weights", "kv_cache"))) == e.EngineSlept()
    assert generator.run.journal.engine_tokens() == 40, "counted while the engine can still be asked"
    assert generator.wake(e.Wake(("weights",))) == e.EngineWoke()
    assert generator.wake(e.Wake(("kv_cache",))) is None
    session.lost = True
    assert generator.sleep(e.Sleep(("weights",))) == e.Interrupted()
    assert generator.wake(e.Wake(("weights",))) == e.Interrupted()
    assert generator.wake(e.Wake(("kv_cache",))) is None
    assert inbox(generator) == [e.EngineLost(0)] * 3


def test_a_dead_engine_needs_no_pause(make_generator):
    generator, session = make_generator()
    handlers = generator.handlers()
    handlers[e.Pause](e.Pause("keep"))
    handlers[e.Resume](e.Resume())
    assert session.done == [("pause", "keep"), ("resume",)]
    session.lost = True
    handlers[e.Pause](e.Pause("keep"))
    assert inbox(generator) == [e.EngineLost(0)]


def test_prompts_over_the_limit_are_counted_and_listed(tmp_path):
    said = []
    run = SimpleNamespace(directory=tmp_path, display=SimpleNamespace(say=said.append))
    report_dropped(run, SimpleNamespace(dropped={}), 64)
    assert (said, list(tmp_path.iterdir())) == ([], [])
    report_dropped(run, SimpleNamespace(dropped={"p7": 90, "p9": 71}), 64)
    assert json.loads((tmp_path / "dropped_prompts.json").read_text()) == {"p7": 90, "p9": 71}
    assert "2 prompts over data.max_prompt_tokens = 64" in said[0]


def test_a_context_longer_than_the_model_is_cut_or_refused(make_run, monkeypatch):
    run = make_run("--data.max_prompt_tokens", 100)
    for positions, expected in ((1024, 108), (64, 64), (None, 108)):
        monkeypatch.setattr(generator_module, "read_text_config", lambda _, p=positions: {"max_position_embeddings": p})
        assert context_length(run) == expected
    monkeypatch.setattr(generator_module, "read_text_config", lambda _: {"max_position_embeddings": 8})
    with pytest.raises(ConfigError, match=r"max_new_tokens = 8: .* has 8 positions"):
        context_length(run)


@pytest.mark.parametrize(
    ("mode", "threads", "cores"), [("async", 1, (1, 2)), ("async", 0, ()), ("async", 3, ()), ("phased", 1, ())]
)
def test_an_overlapped_engine_gets_the_trainers_spare_cores(mode, threads, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = config.Recipe(
        schedule=replace(config.ScheduleConfig(), mode=mode), run=replace(config.RunConfig(), threads=threads)
    )
    assert engine_cores(recipe) == cores
