"""A session ends everything that it started, in the order in which one uses the other."""

import threading
from dataclasses import replace

import pytest

from oapl_engine import config
from oapl_engine.inference.options import EngineOptions
from oapl_engine.rollout import session as module
from oapl_engine.rollout.session import EngineSession, recipe_engine_options


class FakeClient:
    """Of one engine process."""

    def __init__(self, done, number):
        self.done, self.number = done, number

    async def sleep(self, tags):
        self.done.append(f"engine {self.number} sleeps")


class FakeEngine:
    def __init__(self, options, log_path, on_lost):
        self.options, self.die = options, lambda: on_lost(self)
        self.done, self.may_start = [], threading.Event()
        self.client = FakeClient(self.done, 0)
        self.starting, self.started = threading.Event(), threading.Event()

    def restart(self):
        self.starting.set()
        assert self.may_start.wait(10)
        self.client = FakeClient(self.done, 1)
        self.done.append("engine 1 starts")
        self.started.set()

    def stop(self):
        self.ended.append("engine")


class FakeScorer:
    verify = None

    def close(self):
        self.ended.append("verifiers")


@pytest.fixture
def ended(monkeypatch):
    """What ended, in order."""
    ended = []
    monkeypatch.setattr(module, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "ended", ended, raising=False)
    monkeypatch.setattr(FakeScorer, "ended", ended, raising=False)
    close = module.Collector.close

    def closed(collector):
        ended.append("collector")
        close(collector)

    monkeypatch.setattr(module.Collector, "close", closed)
    return ended


def test_the_collector_ends_before_what_it_uses(ended, tmp_path):
    """Else it reports groups as lost, and verdicts as failed, that are only dropped."""
    with EngineSession(EngineOptions("m"), tmp_path / "log", FakeScorer()):
        pass
    assert ended == ["collector", "engine", "verifiers"]


def test_a_failure_of_the_collector_leaves_nothing_running(ended, tmp_path):
    session = EngineSession(EngineOptions("m"), tmp_path / "log", FakeScorer())
    session.collector._failure = ZeroDivisionError("verifier")
    with pytest.raises(ZeroDivisionError):
        session.close()
    assert ended == ["collector", "engine", "verifiers"]


@pytest.mark.parametrize(
    ("mode", "asked", "share"), [("phased", 0.0, 0.85), ("sync", 0.0, 0.85), ("async", 0.0, 0.4), ("async", 0.7, 0.7)]
)
def test_an_engine_beside_the_trainer_asks_for_less(mode, asked, share):
    """In async both hold the same GPU all the time, and vLLM refuses to start where its share is not free."""
    recipe = config.Recipe(
        schedule=replace(config.ScheduleConfig(), mode=mode),
        rollout=replace(config.RolloutConfig(), memory_share=asked),
    )
    assert recipe_engine_options(recipe, "model", 64).memory_share == share


@pytest.fixture
def session(ended, tmp_path):
    """One whose engine is replaced when it dies."""
    with EngineSession(EngineOptions("m"), tmp_path / "log", FakeScorer(), on_lost=lambda: None) as session:
        yield session
        session.engine.may_start.set()


def test_an_engine_that_dies_in_the_trainers_turn_starts_after_it(session):
    """There is no memory for it before; and in the engine's own turn it starts at once."""
    engine = session.engine
    engine.may_start.set()
    session.sleep(("weights", "kv_cache"))
    engine.die()
    assert not engine.starting.wait(0.3)
    engine.done.append("the trainer leaves")
    session.allow_start()
    assert engine.started.wait(10)
    assert engine.done == ["engine 0 sleeps", "the trainer leaves", "engine 1 starts"]


def test_the_trainers_turn_waits_for_an_engine_that_is_starting(session):
    """It takes its memory as it starts, and gives it back before the trainer comes."""
    engine = session.engine
    session.after_restart.append(lambda: engine.done.append("ready"))
    engine.die()
    assert engine.starting.wait(10)
    sleeping = threading.Thread(target=session.sleep, args=(("weights", "kv_cache"),))
    sleeping.start()
    sleeping.join(0.3)
    engine.may_start.set()
    sleeping.join(10)
    assert engine.done == ["engine 1 starts", "ready", "engine 1 sleeps"]


def test_a_session_that_closes_starts_no_engine(session):
    session.sleep(("weights", "kv_cache"))
    session.engine.die()
    session.close()
    assert not session.engine.starting.wait(0.3)
    assert session._deaths.empty()
