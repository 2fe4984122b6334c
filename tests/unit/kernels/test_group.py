import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oapl_kernels import group_advantage, group_value, grpo_advantage, oapl_loss

GROUP = torch.tensor([0, 4])


@pytest.mark.parametrize(("correct", "value"), [(0, 0.0), (1, 0.3574), (2, 0.6201), (3, 0.8280), (4, 1.0)])
def test_golden_values_of_the_paper(correct, value):
    reward = (torch.arange(4) < correct).float()
    assert float(group_value(reward, GROUP, 1.0)) == pytest.approx(value, abs=5e-5)


@settings(max_examples=100, deadline=None)
@given(
    rewards=st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    beta1=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e6, math.inf]),
)
def test_group_value_is_the_published_formula(rewards, beta1):
    """And it is between the mean and the maximum."""
    cu_groups = torch.tensor([0, *torch.tensor([len(group) for group in rewards]).cumsum(0)])
    value = group_value(torch.tensor([r for group in rewards for r in group], dtype=torch.float64), cu_groups, beta1)
    for found, group in zip(value, rewards, strict=True):
        exact = torch.tensor(group, dtype=torch.float64)
        mean, top = float(exact.mean()), float(exact.max())
        assert mean - 1e-9 <= float(found) <= top + 1e-9
        if beta1 <= 30:
            formula = beta1 * (torch.logsumexp(exact / beta1, 0) - math.log(len(group)))
            assert float(found) == pytest.approx(float(formula), abs=1e-9)
        else:
            assert float(found) == pytest.approx(mean, abs=2e-5)


def test_group_value_large_beta1_keeps_its_digits():
    """The plain formula loses them."""
    reward = torch.tensor([0.0, 1.0, 0.0, 0.0])
    plain = 1e7 * (torch.logsumexp(reward / 1e7, 0) - math.log(4))
    assert float(group_value(reward, GROUP, 1e7)) == pytest.approx(0.25, abs=1e-6)
    assert abs(float(plain) - 0.25) > 0.1


def test_grpo_advantage_has_mean_zero_and_deviation_one():
    advantage = grpo_advantage(torch.tensor([1.0, 0, 0, 1, 3, 5, 5, 5]), torch.tensor([0, 4, 8]))
    for group in advantage.split(4):
        assert float(group.mean()) == pytest.approx(0, abs=1e-6)
        assert float(group.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_minimising_oapl_recovers_the_optimal_policy():
    """A tabular softmax and an enumerated group, multiplicities proportional to pi_vllm, beta1 = beta2 = beta:
    the minimum of the loss is pi_vllm * exp(r / beta) / Z."""
    beta, counts = 0.7, torch.tensor([5, 3, 1, 4, 2, 1])
    behavior = (counts / counts.sum()).double()
    reward = torch.tensor([0.0, 1.0, 0.3, -0.5, 0.8, 2.0], dtype=torch.float64)
    answers = torch.arange(len(counts)).repeat_interleave(counts)
    advantage = group_advantage(reward[answers], torch.tensor([0, len(answers)]), beta)
    logits = behavior.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    one = torch.ones(len(answers), 1, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        sequences = torch.arange(len(answers) + 1)
        result = oapl_loss(one, logits[:, None], answers, sequences, behavior.log()[answers], advantage, beta2=beta)
        result.loss.backward()
        return result.loss

    optimizer.step(closure)
    optimum = torch.softmax(behavior.log() + reward / beta, 0)
    assert (torch.softmax(logits.detach(), 0) - optimum).abs().max() < 1e-3
    assert (behavior - optimum).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), GROUP, 0.0), r"beta1 is 0.0; allowed"),
        ((torch.ones(4), torch.tensor([0, 2, 2, 4]), 1.0), r"cu_groups\[2\] is 2 after 2"),
        ((torch.ones(4), torch.tensor([0, 3]), 1.0), r"cu_groups runs from 0 to 3"),
        ((torch.tensor([1, torch.nan, 0, 0]), GROUP, 1.0), r"reward\[1\] is nan"),
        ((torch.ones(4, dtype=torch.int64), GROUP, 1.0), r"reward has dtype int64"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_value(*arguments)
