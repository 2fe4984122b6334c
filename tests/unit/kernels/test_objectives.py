"""Each objective against its published formula, written out sequence by sequence in float64."""

import math

import pytest
import torch
from oapl_kernels import PolicyInputs
from oapl_kernels.objectives import (
    OBJECTIVES,
    Objective,
    cispo,
    dapo,
    decoupled_ppo,
    dr_grpo,
    grpo,
    gspo,
    kimi,
    oapl,
    soft_overlong_penalty,
    tis,
    topr,
    with_reference_kl,
)

LENGTHS = [5, 1, 8, 3]


def batch():
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    tokens = sum(LENGTHS)
    logprob = -normal(tokens).abs()
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[[1, 9]] = False
    return logprob, PolicyInputs(
        behavior_logprob=logprob + 0.4 * normal(tokens),
        advantage=torch.tensor([1.0, -0.5, -2.0, 0.7], dtype=torch.float64),
        proximal_logprob=logprob + 0.3 * normal(tokens),
        reference_logprob=logprob + 0.5 * normal(tokens),
        mask=mask,
        cu_seqlens=torch.tensor([0, 5, 6, 14, 17]),
    )


def sequences(logprob, inputs):
    """Per sequence: log-probs, behaviour, proximal, reference of its trained tokens, and its advantage."""
    columns = (logprob, inputs.behavior_logprob, inputs.proximal_logprob, inputs.reference_logprob)
    for index, advantage in enumerate(inputs.advantage):
        span = slice(int(inputs.cu_seqlens[index]), int(inputs.cu_seqlens[index + 1]))
        yield *(column[span][inputs.mask[span]] for column in columns), advantage


def clipped(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def published_oapl(new, old, prox, ref, A):
    return (0.3 * (new - old).sum() - A) ** 2


def published_kimi(new, old, prox, ref, A):
    return (A - 0.3 * (new.sum() - old.sum())) ** 2


def published_grpo(new, old, prox, ref, A):
    return -clipped(torch.exp(new) / torch.exp(old), A, 0.2, 0.2).mean()


def published_dr_grpo(new, old, prox, ref, A):
    return -clipped(torch.exp(new) / torch.exp(old), A, 0.2, 0.2).sum()


def published_dapo(new, old, prox, ref, A):
    return -clipped(torch.exp(new) / torch.exp(old), A, 0.2, 0.28).sum()


def published_tis(new, old, prox, ref, A):
    weight = (torch.exp(prox) / torch.exp(old)).clamp(max=1.2)
    return -(weight * clipped(torch.exp(new) / torch.exp(prox), A, 0.2, 0.2)).mean()


def published_tis_sequence(new, old, prox, ref, A):
    weight = min(math.exp(float(new.detach().sum() - old.sum())), 1.2)
    return -weight * A * new.mean()


def published_gspo(new, old, prox, ref, A):
    return -clipped((torch.exp(new).prod() / torch.exp(old).prod()) ** (1 / len(new)), A, 0.1, 0.2)


def published_cispo(new, old, prox, ref, A):
    return -((torch.exp(new) / torch.exp(old)).detach().clamp(0.5, 1.3) * A * new).sum()


def published_decoupled(new, old, prox, ref, A):
    return -(torch.exp(prox) / torch.exp(old) * clipped(torch.exp(new) / torch.exp(prox), A, 0.2, 0.2)).sum()


def published_topr(new, old, prox, ref, A):
    weight = 1.0 if A >= 0 else min(1.0, math.exp(float(new.detach().sum() - old.sum())))
    return -weight * A * new.sum()


def published_reference_kl(new, old, prox, ref, A):
    ratio = torch.exp(ref) / torch.exp(new)
    return published_oapl(new, old, prox, ref, A) + 0.1 * (ratio - torch.log(ratio) - 1).sum()


@pytest.mark.parametrize(
    ("objective", "published"),
    [
        (oapl(0.3), published_oapl),
        (kimi(0.3), published_kimi),
        (grpo(), published_grpo),
        (dr_grpo(), published_dr_grpo),
        (dapo(), published_dapo),
        (tis(cap=1.2), published_tis),
        (tis(cap=1.2, level="sequence"), published_tis_sequence),
        (gspo(0.1, 0.2), published_gspo),
        (cispo(0.5, 0.3), published_cispo),
        (decoupled_ppo(), published_decoupled),
        (topr(), published_topr),
        (with_reference_kl(oapl(0.3), 0.1), published_reference_kl),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_loss_and_gradient_match_the_published_formula(objective, published):
    logprob, inputs = batch()
    ours, theirs = logprob.clone().requires_grad_(), logprob.clone().requires_grad_()
    loss = sum(fn(ours, inputs) for fn in (objective.fn, objective.token_fn) if fn)
    exact = sum(published(*columns) for columns in sequences(theirs, inputs))
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    loss.backward()
    exact.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14)
    assert ours.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_scope_tells_the_truth(name):
    """scope "token": no token's derivative depends on another's log-prob; "sequence": one value a sequence."""
    objective = OBJECTIVES[name](0.3) if name in ("oapl", "kimi") else OBJECTIVES[name]()
    logprob, inputs = batch()

    def derivative(values):
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad(objective.fn(leaf, inputs), leaf)[0]

    whole = derivative(logprob)
    if objective.scope == "token":
        moved = logprob.clone()
        moved[3:] -= 0.37
        torch.testing.assert_close(derivative(moved)[:3], whole[:3], rtol=0, atol=0)
    else:
        for start, end in zip(inputs.cu_seqlens, inputs.cu_seqlens[1:], strict=False):
            trained = whole[start:end][inputs.mask[start:end]]
            torch.testing.assert_close(trained, trained[:1].expand_as(trained), rtol=1e-12, atol=0)


def test_soft_overlong_penalty_is_dapo_equation_13():
    lengths = torch.tensor([10, 80, 90, 100, 120])
    torch.testing.assert_close(soft_overlong_penalty(lengths, 100, 20), torch.tensor([0, 0, -0.5, -1, -1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oapl(0), "beta2 is 0; allowed"),
        (lambda: oapl(float("nan")), "beta2 is nan; allowed"),
        (lambda: grpo(1.5), "clip_low, clip_high are 1.5"),
        (lambda: tis(level="word"), "level is 'word'; allowed"),
        (lambda: Objective("mine", "batch", lambda logprob, inputs: logprob.sum()), "scope of objective 'mine'"),
        (
            lambda: decoupled_ppo().fn(torch.zeros(2), PolicyInputs(torch.zeros(2), torch.zeros(1))),
            "proximal_logprob is None",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_uncorrected_grpo_takes_samples_for_its_own():
    """Its gradient is that of on-policy samples, whatever generated them."""
    logprob, inputs = batch()
    logprob.requires_grad_()
    (found,) = torch.autograd.grad(grpo(corrected=False).fn(logprob, inputs), logprob)
    expected = -inputs.per_token(inputs.advantage / inputs.lengths()) * inputs.mask
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
