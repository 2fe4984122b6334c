"""One optimizer step: what it refuses leaves the weights alone; its metrics are what they say."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from oapl_kernels import Objective
from oapl_kernels.objectives import decoupled_ppo, oapl

from oapl_engine import config
from oapl_engine.trainer.checkpoint import weight_hash
from oapl_engine.trainer.optimizer import learning_rate, make_optimizer
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.score import fill_logprobs
from oapl_engine.trainer.step import NonFiniteError, train_step

OPTIMIZER = config.OptimizerConfig(learning_rate=1e-3)


@pytest.fixture
def scene(make_policy, groups):
    policy = make_policy()
    items = groups.items(groups.ragged())
    return policy, make_optimizer(policy, OPTIMIZER), pack(items, 200, True)


def step(scene, batches=None, objective=None, **options):
    policy, optimizer, packed = scene
    options = {"learning_rate": 1e-3, "normalizer": 14.0} | options
    return train_step(policy, optimizer, batches or packed, objective or oapl(beta2=0.1), **options)


def test_loss_falls(scene):
    """Ten steps on the same rollouts reduce the loss by half or more."""
    losses = [step(scene).metrics["loss"] for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_masters(make_policy, groups):
    """Master weights in bfloat16: the loss still falls, in whatever the head's gradient comes back."""
    policy = make_policy("llama_tied", torch.bfloat16)
    scene = policy, make_optimizer(policy, OPTIMIZER), pack(groups.items(groups.ragged()), 200, True)
    losses = [step(scene, learning_rate=1e-2).metrics["loss"] for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_metrics(scene):
    """Loss, residual and log-ratios follow from the log-probs; every value goes into JSON."""
    policy, _, batches = scene
    logprob = np.concatenate([policy.logprob(b, 1.0).detach().double().numpy() for b in batches])
    ratio = logprob - np.concatenate([b.behavior_logprob[b.rows] for b in batches])
    advantage = np.concatenate([b.advantage for b in batches])
    lengths = np.concatenate([np.diff(b.cu_seqlens) for b in batches])
    residual = 0.1 * np.array([x.sum() for x in np.split(ratio, np.cumsum(lengths)[:-1])]) - advantage
    found = step(scene).metrics
    assert found["loss"] == pytest.approx((residual**2).sum() / 14, rel=1e-5)
    assert found["residual/mean"] == pytest.approx(residual.mean(), rel=1e-4)
    assert found["log_ratio/mean"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert found["log_ratio/std"] == pytest.approx(ratio.std(), rel=1e-4)
    assert found["log_ratio/max"] == pytest.approx(np.abs(ratio).max(), rel=1e-4)
    assert found["tokens/trained"] == len(logprob)
    assert 0 < found["entropy/all/mean"] < np.log(97)
    json.dumps(found, allow_nan=False)


def test_clipping_reports_the_unclipped_norm(scene, make_policy):
    """SGD moves the weights by lr * clip_norm; grad_norm is the norm before clipping."""
    policy, _, batches = scene
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=1.0)
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    norm = step((policy, optimizer, batches), clip_norm=0.5, learning_rate=1.0).metrics["optim/grad_norm"]
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in policy.trainable().items()) ** 0.5
    assert norm > 1
    assert moved == pytest.approx(0.5, rel=1e-3)


def _poison(batch, field, value):
    values = getattr(batch, field).copy()
    values[batch.rows[0] if field == "behavior_logprob" else 0] = value
    return dataclasses.replace(batch, **{field: values})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("field", "named"), [("advantage", "reward or advantage"), ("behavior_logprob", "behaviour log-prob")]
)
def test_nonfinite_input_is_refused(scene, field, named, value):
    """NaN and Inf in reward or log-prob: the error names the rollout, and weights and moments stay as they were."""
    policy, optimizer, batches = scene
    step(scene)
    before, moments = weight_hash(policy.model), _moments(optimizer)
    bad = [batches[0], _poison(batches[1], field, value)]
    with pytest.raises(NonFiniteError, match=f"{named} is NaN or Inf in rollouts {batches[1].keys[0]}: the step is"):
        step(scene, bad)
    skipped = step(scene, bad, nonfinite="skip")
    assert not skipped.stepped
    assert batches[1].keys[0] in skipped.reason
    assert weight_hash(policy.model) == before
    assert all(torch.equal(a, b) for a, b in zip(_moments(optimizer), moments, strict=True))


def _moments(optimizer):
    return [s[k].clone() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]


def test_nonfinite_weight_and_loss_are_refused(scene):
    """A NaN that arises inside: log-probs from a broken weight, a loss that overflows. A good step works afterwards."""
    policy, _, _ = scene
    weight = next(iter(policy.trainable().values()))
    kept = weight[5].detach().clone()
    weight.data[5] = torch.nan
    with pytest.raises(NonFiniteError, match="log-prob is NaN or Inf in rollouts 0"):
        step(scene)
    weight.data[5] = kept
    overflow = Objective("overflow", "sequence", lambda logprob, inputs: (inputs.per_sequence(logprob) * 1e38).sum())
    with pytest.raises(NonFiniteError, match="is NaN or Inf in"):
        step(scene, objective=overflow)
    assert all(not p.grad.any() for p in policy.trainable().values())
    before = weight_hash(policy.model)
    assert step(scene).stepped
    assert weight_hash(policy.model) != before


def test_nonfinite_gradient_is_refused(scene):
    """Finite loss, infinite gradient: the parameter and the rollouts are named."""
    policy, _, _ = scene
    before = weight_hash(policy.model)
    handle = next(iter(policy.trainable().values())).register_hook(lambda g: g + torch.inf)
    with pytest.raises(NonFiniteError, match=r"gradient of model\.embed_tokens\.weight is NaN or Inf .* 0\.p1\.0\.0"):
        step(scene)
    handle.remove()
    assert weight_hash(policy.model) == before


def test_proximal_logprob(scene):
    """An objective that asks for log-probs at the start of the step gets them: its ratio is 1 there."""
    policy, _, batches = scene
    filled = fill_logprobs("proximal_logprob", policy, batches, 1.0)
    np.testing.assert_allclose(filled[0].proximal_logprob[filled[0].rows], policy.logprob(batches[0], 1.0).detach())
    assert step(scene, filled, decoupled_ppo()).stepped


def test_learning_rate():
    """2 % linear warm-up to the peak, cosine to 5 %; without both it is constant."""
    rates = [learning_rate(config.OptimizerConfig(learning_rate=1.0), i, 100) for i in range(100)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    constant = config.OptimizerConfig(learning_rate=1.0, warmup_share=0.0, decay_to=1.0)
    assert {learning_rate(constant, i, 10) for i in range(10)} == {1.0}
