"""A session ends everything that it started, in the order in which one uses the other."""

import pytest

from oapl_engine.inference.options import EngineOptions
from oapl_engine.rollout import session as module
from oapl_engine.rollout.session import EngineSession


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
