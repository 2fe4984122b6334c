"""Every way through the pass, from memory full of NaN (conftest), has the gradients of plain autograd in float64."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from oapl_kernels import fused_policy_loss
from oapl_kernels.objectives import grpo, oapl, with_reference_kl

from tests.support.head_reference import CPU, make_case

LEAVES = ("hidden", "weight", "bias")
SHAPES = {
    "one chunk": {"lengths": [5, 1, 9]},
    "several chunks": {"lengths": [5, 12, 13, 16, 3]},
    "rows wait": {"lengths": [3, 71, 8], "depth": 80},
    "sums wait": {"lengths": [3, 71, 8], "depth": 8},
    "no tokens": {"lengths": []},
}
TOKENS = ("some masked", "all masked", "a sequence ignored", "all ignored")
# softcap, entropy coefficient, objective
TERMS = [(None, 0.0, oapl(0.05)), (3.0, 0.0, with_reference_kl(oapl(0.05), 0.1)), (3.0, 0.02, grpo())]
WANTED = [LEAVES, *combinations(LEAVES, 2), ("bias",)]


def ignored(tokens, case):
    """bool [T]: tokens whose target is ignored, which do not reach the head."""
    index = torch.arange(len(case.target))
    return {
        "a sequence ignored": (index < case.cu_seqlens[:2].max()) | (index % 3 == 1),
        "all ignored": index >= 0,
    }.get(tokens, index < 0)


def exact_gradients(case, trained):
    """Of hidden, weight and bias, in float64 by autograd through plain operations."""
    wide = case.to(torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (wide.hidden, wide.weight, wide.bias)]
    z = torch.nn.functional.linear(*leaves)
    z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
    logs = torch.log_softmax(z / case.temperature, -1)
    inputs = replace(wide.inputs, mask=trained, cu_seqlens=case.cu_seqlens)
    logprob = torch.where(trained, logs.gather(1, case.target[:, None])[:, 0], 0)
    functions = [fn for fn in (case.objective.fn, case.objective.token_fn) if fn is not None]
    entropy = -(logs.exp() * logs).sum(1)
    loss = sum(fn(logprob, inputs) for fn in functions) - case.entropy_coefficient * (entropy * trained).sum()
    return torch.autograd.grad(loss / case.normalizer, leaves, materialize_grads=True)


def found_gradients(case, target, wanted, before, backend):
    """The same of fused_policy_loss, None where not wanted; `before`: what weight_grad holds, or None."""
    leaves = [getattr(case, name).clone().requires_grad_(name in wanted) for name in LEAVES]
    added = None if before is None else before.clone()
    loss = fused_policy_loss(
        leaves[0],
        leaves[1],
        target,
        case.cu_seqlens,
        case.objective,
        case.inputs,
        normalizer=case.normalizer,
        entropy_coefficient=case.entropy_coefficient,
        bias=leaves[2],
        softcap=case.softcap,
        weight_grad=added,
        chunk_tokens=16,
        backend=backend,
    ).loss
    if loss.requires_grad:
        loss.backward()
    assert torch.isfinite(loss.detach())
    gradients = [leaf.grad for leaf in leaves]
    return gradients if added is None else [gradients[0], added - before, gradients[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_from_memory_of_nan(shape, tokens, dtype, backend):
    """With and without softcap, entropy, weight_grad and frozen leaves; bfloat16 to its own precision."""
    assert torch.empty(1).isnan().all()
    for softcap, entropy, objective in TERMS:
        sizes = {"depth": 8, "vocabulary": 21} | SHAPES[shape]
        case = make_case(objective, seed=0, dtype=dtype, softcap=softcap, entropy_coefficient=entropy, **sizes)
        left_out = ignored(tokens, case)
        mask = case.inputs.mask & (tokens != "all masked")
        case = replace(case, inputs=replace(case.inputs, mask=mask))
        exact = dict(zip(LEAVES, exact_gradients(case, mask & ~left_out), strict=True))
        target = torch.where(left_out, -100, case.target)
        before = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(1))
        for wanted, given in product(WANTED, (None, before)):
            if given is not None and "weight" not in wanted:
                continue
            gradients = dict(zip(LEAVES, found_gradients(case, target, wanted, given, backend), strict=True))
            for name in LEAVES:
                if name not in wanted:
                    assert gradients[name] is None
                    continue
                limit = (3e-2 if dtype == torch.bfloat16 else 1e-5) * exact[name].norm() + 1e-5
                error = (gradients[name].double() - exact[name]).norm()
                assert error <= limit, (name, wanted, softcap, entropy, objective.name, given is not None)
