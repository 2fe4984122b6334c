"""What the generator tells its user beside events."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from oapl_engine import config
from oapl_engine.orchestrator.generator import Generator, engine_cores, list_dropped
from oapl_engine.samples import Group, Prompt, Span, make_rollout
from oapl_engine.scheduler import events as e


def test_prompts_over_the_limit_are_counted_and_listed(tmp_path):
    said = []
    learner = SimpleNamespace(run_dir=tmp_path, display=SimpleNamespace(say=said.append))
    list_dropped(SimpleNamespace(dropped={}), 64, learner)
    assert (said, list(tmp_path.iterdir())) == ([], [])
    list_dropped(SimpleNamespace(dropped={"p7": 90, "p9": 71}), 64, learner)
    assert json.loads((tmp_path / "dropped_prompts.json").read_text()) == {"p7": 90, "p9": 71}
    assert "2 prompts over data.max_prompt_tokens = 64" in said[0]


def test_a_submit_is_dealt_to_all_ranks_whose_engine_serves():
    generators = [
        SimpleNamespace(rank=r, dealt=0, learner=SimpleNamespace(ranks=SimpleNamespace(world=3))) for r in range(3)
    ]
    shares = lambda command: [Generator._share(g, command) for g in generators]  # noqa: E731
    assert shares(e.Submit(4)) == [2, 1, 1]
    assert shares(e.Submit(2)) == [0, 1, 1]
    assert shares(e.Submit(5, without=(1,))) == [3, 0, 2]


def test_a_version_from_the_future_is_refused_before_it_is_logged():
    logged = []
    log = SimpleNamespace(append=logged.append)
    generator = SimpleNamespace(learner=SimpleNamespace(version=3, log=log))
    prompt = Prompt("p", np.array([1], np.int32), "t")
    rollout = make_rollout(prompt, "0.p.0", 0, [2], spans=(Span(4, 0, 1),), finish="stop", status="scored", reward=1.0)
    with pytest.raises(config.RunError, match=r"group 0\.p\.0 holds tokens of version 4.*published is 3"):
        Generator._on_group(generator, Group("0.p.0", prompt, (rollout,), 4))
    assert not logged


@pytest.mark.parametrize(
    ("mode", "threads", "cores"), [("async", 1, (1, 2)), ("async", 0, ()), ("async", 3, ()), ("phased", 1, ())]
)
def test_an_overlapped_engine_gets_the_cores_that_the_trainer_leaves(mode, threads, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = config.Recipe(
        schedule=replace(config.ScheduleConfig(), mode=mode), run=replace(config.RunConfig(), threads=threads)
    )
    assert engine_cores(recipe) == cores
