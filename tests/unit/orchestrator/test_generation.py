"""The order in which a run's handlers carry out one command."""

from types import SimpleNamespace

from oapl_engine import train
from oapl_engine.orchestrator import generation
from oapl_engine.orchestrator.learner import Learner
from oapl_engine.rollout.session import EngineSession
from oapl_engine.scheduler import events as e


def test_an_engine_starts_when_the_trainer_has_left(make_recipe, monkeypatch):
    """OffloadTrainer: probes are scored on the device, the trainer leaves it, an engine that died may start there."""
    done = []

    class FakeSession(EngineSession):
        def __init__(self, *_):
            self.after_restart = []
            self.control = SimpleNamespace(resume=None)

        def allow_start(self):
            done.append("engine may start")

        def __exit__(self, *_):
            pass

    class FakeSync:
        def __init__(self, *_):
            pass

        def handlers(self):
            return {e.OffloadTrainer: lambda _: done.append("probes are scored")}

        def close(self):
            pass

    def drive(state, inbox, handlers, *_):
        done.clear()
        for handler in handlers[e.OffloadTrainer]:
            handler(e.OffloadTrainer())
        return state, 130

    monkeypatch.setattr(generation, "EngineSession", FakeSession)
    monkeypatch.setattr(generation, "WeightSync", FakeSync)
    monkeypatch.setattr(generation, "Scorer", lambda *_, **__: None)
    monkeypatch.setattr(Learner, "offload", lambda *_: done.append("trainer leaves"))
    monkeypatch.setattr(train, "drive", drive)
    assert train.run_recipe(make_recipe("--schedule.mode", "phased")) == 130
    assert done == ["probes are scored", "trainer leaves", "engine may start"]
