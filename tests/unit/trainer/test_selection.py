"""What a step trains on: the rules that drop rollouts, advantages, scale-free beta2, objectives by name."""

import dataclasses
import math

import numpy as np
import pytest
from oapl_kernels.objectives import OBJECTIVES

from oapl_engine.config import ObjectiveConfig
from oapl_engine.errors import ConfigError
from oapl_engine.trainer.objective import make_objective, normalizer
from oapl_engine.trainer.score import replace_behavior_logprob
from oapl_engine.trainer.selection import select_rollouts


def section(**options):
    return ObjectiveConfig(**options)


def test_golden_values(groups):
    """beta1 = 1, binary rewards, 1/4, 1/2, 3/4 correct: V = .3574, .6201, .8280; A = r - V."""
    made = [groups.make(c, 3, [2] * 4, rewards=[1.0] * c + [0.0] * (4 - c)) for c in (1, 2, 3)]
    data = select_rollouts(made, section(), 10)
    for item, correct, value in zip(data.groups, (1, 2, 3), (0.3574, 0.6201, 0.8280), strict=True):
        np.testing.assert_allclose(item.advantage, [1 - value] * correct + [-value] * (4 - correct), atol=1e-4)
    assert data.metrics["value/mean"] == pytest.approx(np.mean([0.3574, 0.6201, 0.8280]), abs=1e-4)
    assert data.metrics["reward/all/mean"] == 0.5
    assert data.metrics["filters/zero_variance"] == 0


def test_equal_groups(groups):
    """drop: none of them; keep: all; subsample: the first ones, as many as there are unequal groups."""
    rewards = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    made = [groups.make(i, 3, [2, 2], rewards=r) for i, r in enumerate(rewards)]

    def kept(rule):
        data = select_rollouts(made, section(equal_groups=rule), 10)
        assert data.metrics["filters/zero_variance"] == 0.75
        assert {*data.keys} | {*data.dropped} == {r.key for g in made for r in g.rollouts}
        assert set(data.dropped.values()) <= {"equal_rewards"}
        return [item.rollouts[0].group for item in data.groups]

    assert kept("drop") == ["0.p1.0"]
    assert kept("subsample") == ["0.p0.0", "0.p1.0"]
    assert kept("keep") == [g.id for g in made]


def test_overlong(groups):
    """excluded: out of step and value; soft: minus 1 at the limit, half of it in the middle of the last fifth."""
    group = groups.make(0, 3, [10, 9, 4, 4], rewards=[1.0, 1.0, 0.0, 1.0], finishes=["length", "stop", "stop", "stop"])
    scored = select_rollouts([group], section(beta1=math.inf), 10)
    np.testing.assert_allclose(scored.groups[0].advantage, [0.25, 0.25, -0.75, 0.25])
    assert scored.metrics["is_truncated/mean"] == 0.25
    excluded = select_rollouts([group], section(beta1=math.inf, overlong="excluded"), 10)
    np.testing.assert_allclose(excluded.groups[0].advantage, np.array([1, -2, 1]) / 3, rtol=1e-6)
    assert excluded.dropped == {group.rollouts[0].key: "overlong"}
    soft = select_rollouts([group], section(beta1=math.inf, overlong="soft"), 10)
    np.testing.assert_allclose(soft.groups[0].advantage, np.array([0.0, 0.5, 0.0, 1.0]) - 0.375)


def test_small_groups_and_statuses(groups):
    """Fewer than two scored rollouts: dropped by rule. Rollouts that are not scored have a column of their own."""
    group = groups.make(0, 3, [2, 2, 2], rewards=[1.0, 0.0, 1.0])
    rollouts = [dataclasses.replace(r, status="invalid", reward=None) for r in group.rollouts[:2]]
    lonely = dataclasses.replace(group, rollouts=(*rollouts, group.rollouts[2]))
    data = select_rollouts([lonely], section(), 10)
    assert data.groups == ()
    assert data.dropped == {group.rollouts[2].key: "group_too_small"}
    assert data.metrics["advantage/mean"] is None


def test_recorded_rewards(groups):
    """The value comes from all rewards recorded for the prompt, and then one response is enough."""
    group = groups.make(0, 3, [2], rewards=[1.0])
    data = select_rollouts([group], section(beta1=math.inf), 10, {group.id: np.array([1.0, 0.0, 0.0, 0.0])})
    np.testing.assert_allclose(data.groups[0].advantage, [0.75])


def test_nonfinite_reward_reaches_the_step(groups):
    """NaN passes as NaN, so that train_step refuses it by the recipe's rule; metrics stay free of it."""
    data = select_rollouts([groups.make(0, 3, [2, 2], rewards=[math.nan, 1.0])], section(scale_free_nats=1.0), 10)
    assert np.isnan(data.groups[0].advantage).all()
    assert data.beta2 == section().beta2
    assert data.metrics["reward/all/mean"] is None


@pytest.mark.parametrize("nats", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_scale_free_beta2(nats, scale, groups):
    """rms(A) / beta2 is the target, whatever the rewards' scale."""
    rewards = [scale * r for r in (0.0, 1.0, -2.0, 0.5)]
    data = select_rollouts([groups.make(0, 3, [2] * 4, rewards=rewards)], section(scale_free_nats=nats), 10)
    advantage = data.groups[0].advantage.astype(np.float64)
    assert np.sqrt(np.mean(advantage**2)) / data.beta2 == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_by_name(name, groups):
    """Every objective is made from the recipe; advantages have the published baseline and scale."""
    chosen = section(name=name, beta2=0.5)
    assert make_objective(chosen, 0.5).fn is not None
    assert make_objective(chosen, 0.5).needs == (("proximal_logprob",) if name == "decoupled_ppo" else ())
    data = select_rollouts([groups.make(0, 3, [2] * 4, rewards=[1.0, 0.0, 0.0, 0.0])], chosen, 10)
    assert name == "oapl" or abs(data.metrics["advantage/mean"]) < 1e-6
    spread = np.std(data.groups[0].advantage)
    assert spread == pytest.approx(np.std([1, 0, 0, 0]) if name in ("oapl", "kimi", "dr_grpo", "topr") else 1, rel=1e-4)


def test_objective_errors():
    with pytest.raises(ConfigError, match=r'objective.name = "oapI" is unknown; did you mean oapl\?'):
        make_objective(section(name="oapI"), 0.1)
    with pytest.raises(ConfigError, match=r"objective.options.clip: grpo has only clip_low, clip_high"):
        make_objective(section(name="grpo", options={"clip": 0.2}), 0.1)
    with pytest.raises(ConfigError, match=r"objective.options of grpo: clip_low, clip_high are 2, 0.2"):
        make_objective(section(name="grpo", options={"clip_low": 2}), 0.1)


def test_normalizer():
    for name, divisor in (("oapl", 8), ("dapo", 100), ("dr_grpo", 400)):
        assert normalizer(make_objective(section(name=name), 0.1), 8, 100, 50) == divisor


def test_with_behavior(groups):
    """Recomputed log-probs take the place of recorded ones, response tokens only; other rollouts stay."""
    group = groups.make(0, 3, [2, 2])
    (changed,) = replace_behavior_logprob([group], {group.rollouts[0].key: np.array([-1.0, -2.0], np.float32)})
    np.testing.assert_array_equal(changed.rollouts[0].behavior_logprob, [0, 0, 0, -1, -2])
    assert changed.rollouts[1] is group.rollouts[1]
