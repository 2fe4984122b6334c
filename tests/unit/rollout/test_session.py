"""A session ends everything that it started, in the order in which one uses the other."""

from dataclasses import replace

import pytest

from oapl_engine import config
from oapl_engine.inference.options import EngineOptions
from oapl_engine.rollout import session as module
from oapl_engine.rollout.session import EngineSession, recipe_engine_options


class FakeEngine:
    def __init__(self, options, log_path, on_lost):
        self.options, self.client = options, None

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
