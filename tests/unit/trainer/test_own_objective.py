"""objective.name = "package.module:factory": a loss from a module of the user's own."""

import pytest
import torch

from oapl_engine.config import ObjectiveConfig, OptimizerConfig
from oapl_engine.errors import ConfigError
from oapl_engine.trainer.objective import make_objective
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.selection import select_rollouts
from oapl_engine.trainer.step import train_step

OWN = """
from oapl_kernels.objectives import OBJECTIVES

def halved(beta2, share=0.5):
    return OBJECTIVES["oapl"](beta2=beta2 * share)

def nothing():
    return None

def leaves():
    raise SystemExit(0)

number = 5
"""


@pytest.fixture(autouse=True)
def _own_module(monkeypatch, tmp_path):
    (tmp_path / "own_objective.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def section(name, **options):
    return ObjectiveConfig(name=name, beta2=0.2, equal_groups="keep", options=options)


def test_an_own_objective_trains(make_policy, groups):
    """The module's objective, OAPL with half of beta2, gives the weights of OAPL with half of beta2."""

    def trained(chosen):
        policy, selection = make_policy(), select_rollouts(groups.ragged(), chosen, 100)
        batches = policy.batches(list(selection.groups), 200, True)
        optimizer = make_optimizer(policy, OptimizerConfig())
        objective = make_objective(chosen, selection.beta2)
        result = train_step(policy, optimizer, batches, objective, learning_rate=1e-3, normalizer=14.0)
        assert result.stepped
        return policy.trainable()

    own = trained(section("own_objective:halved"))
    built_in = trained(ObjectiveConfig(name="oapl", beta2=0.1, equal_groups="keep"))
    assert all(torch.equal(own[name], built_in[name]) for name in built_in)
    assert make_objective(section("own_objective:halved", share=0.1), 0.2).log_ratio_weight == pytest.approx(0.02)


def test_a_wrong_own_objective_is_named():
    for name, message in {
        "own_objective:halfed": r"cannot be loaded: .*no attribute",
        "own_objectiv:halved": "cannot be loaded: No module named",
        "own_objective:nothing": "made a NoneType: a factory returns",
        "own_objective:leaves": r"fails:(.|\n)*SystemExit: 0",
        "own_objective:number": "is 5, not a factory",
    }.items():
        with pytest.raises(ConfigError, match=rf'objective\.name = "{name}" {message}'):
            make_objective(section(name), 0.2)
    with pytest.raises(ConfigError, match=r"objective\.options\.shar: own_objective:halved has only beta2, share"):
        make_objective(section("own_objective:halved", shar=1), 0.2)
