"""The kernels' operations under torch.compile: custom ops are one node, the policy loss breaks the graph."""

import subprocess
import sys
import warnings

import pytest
import torch
from oapl_kernels import head, linear_logprob, oapl_loss, sequence_sum
from oapl_kernels.backend import extension
from oapl_kernels.epilogue import cast_in_place
from oapl_kernels.testing import FUNCTIONS
from torch.library import opcheck

from tests.support.head_reference import NOT_BUILT

needs_extension = pytest.mark.skipif(extension() is None, reason=NOT_BUILT)
TARGET = torch.tensor([3, 49, -100, 0, 7, 20])


def leaves(dtype=torch.float32):
    shapes = ((6, 16), (50, 16), (50,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def head_arguments(dtype, backend, softcap=None):
    hidden, weight, bias = leaves(dtype)
    return hidden, weight, TARGET, bias, dtype, -100, 0.7, softcap, 4, backend, None


def epilogue_arguments(backend):
    logits, target, stats = torch.randn(6, 50), torch.tensor([3, 49, -1, 0, 7, 20]), torch.empty(4, 6)
    torch.ops.oapl_kernels.epilogue_statistics(logits, target, stats, 0.7, 3.0, backend)
    return logits, target, stats


def arguments(name, backend):
    """One good call of an operation."""
    if name == "head_logprob":
        return head_arguments(torch.bfloat16, backend)
    if name == "head_logprob_backward":
        inputs = [a.detach() if isinstance(a, torch.Tensor) else a for a in head_arguments(torch.float32, backend, 3.0)]
        stats = torch.ops.oapl_kernels.head_logprob(*inputs)[2]
        return [True, False, True], torch.randn(6), None, stats, *inputs
    if name == "epilogue_statistics":
        logits, target, _ = epilogue_arguments(backend)
        return logits, target, torch.zeros(4, 6), 0.7, None, backend
    if name == "epilogue_gradient":
        logits, target, stats = epilogue_arguments(backend)
        return logits, target, stats, torch.randn(6), torch.randn(6), 0.7, 3.0, torch.float32, backend
    if name == "sequence_sums":
        return torch.randn(7, requires_grad=True), torch.tensor([0, 3, 7]), torch.arange(7) % 3
    if name == "product":
        if extension() is None or not extension().multiplies(False):
            pytest.skip("this processor has no product of ours")
        return torch.randn(6, 40), torch.randn(40, 5), torch.zeros(6, 5), True
    assert name == "pack_payload", f"no arguments for {name}"
    return torch.randn(40), torch.empty(40, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_torch_accepts_every_operation(name, backend, monkeypatch):
    """Schema, autograd registration, fake results and tracing with symbolic shapes, as torch.library checks them."""
    # opcheck compares the bits of what was not written, too, and NaN equals nothing
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    results = opcheck(getattr(torch.ops.oapl_kernels, name).default, arguments(name, backend))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def scored(hidden, weight, bias):
    logprob, entropy = linear_logprob(hidden.sin(), weight, TARGET, bias=bias, temperature=0.7, return_entropy=True)
    sums = sequence_sum(logprob, torch.tensor([0, 2, 6]), TARGET != 7)
    return (sums.square() + 1).log().sum() - 0.1 * entropy.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_scoring_compiles_into_one_graph(backend, dtype):
    inputs = leaves(dtype)
    compiled = torch.compile(scored, backend=backend, fullgraph=True)
    expected, found = scored(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_the_epilogue_compiles_into_one_graph():
    def gradient(logits, target, coefficient):
        stats = logits.new_empty(4, len(logits))
        head.epilogue_statistics(logits, target, stats, 1.0, None, "torch")
        head.epilogue_gradient(logits, target, stats, coefficient, None, 1.0, None, torch.bfloat16, "torch")
        return stats[0], cast_in_place(logits, torch.bfloat16) * 2

    logits, target, coefficient = torch.randn(5, 31), torch.arange(5), torch.randn(5)
    expected = gradient(logits.clone(), target, coefficient)
    found = torch.compile(gradient, backend="aot_eager", fullgraph=True)(logits.clone(), target, coefficient)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_compiled_call_still_names_what_is_wrong():
    hidden, weight, _ = leaves()
    compiled = torch.compile(lambda target: linear_logprob(hidden, weight, target), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"target\[5\] is 50; allowed: 0 to 49"):
        compiled(torch.tensor([0, 1, 2, 3, 4, 50]))


def test_a_second_derivative_is_refused():
    hidden, weight, _ = leaves()
    (gradient,) = torch.autograd.grad(linear_logprob(hidden, weight, TARGET).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_compiled_step_breaks_once_and_is_unchanged():
    """The break is at the policy loss."""
    layer, weight = torch.nn.Linear(16, 16), torch.nn.Parameter(torch.randn(50, 16))
    inputs, target, offsets = torch.randn(12, 16), torch.randint(0, 50, (12,)), torch.tensor([0, 5, 12])

    def loss(x):
        hidden = torch.relu(layer(x))
        score = linear_logprob(hidden, weight, target, chunk_tokens=5).mean()
        return oapl_loss(hidden, weight, target, offsets, torch.zeros(12), torch.ones(2), beta2=0.1).loss + score

    expected = torch.autograd.grad(loss(inputs), [layer.weight, weight])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not know how to trace.*")
        found = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(inputs), [layer.weight, weight])
    torch.testing.assert_close(found, expected)
    breaks = torch._dynamo.explain(loss)(inputs)
    assert breaks.graph_break_count == 1, breaks
    assert breaks.graph_count == 2


def test_calling_the_operations_does_not_import_the_compiler():
    """It would cost every program three seconds."""
    program = (
        "import sys, torch, oapl_kernels as k; h = torch.ones(3, 2, requires_grad=True); y = torch.tensor([0, 1, 1]);"
        "k.linear_logprob(h, torch.ones(4, 2), y).sum().backward();"
        "inputs = y, torch.tensor([0, 3]), torch.zeros(3), torch.ones(1);"
        "k.oapl_loss(h, torch.ones(4, 2), *inputs, beta2=1).loss.backward();"
        "assert not {'torch._dynamo', 'triton', 'transformers', 'vllm', 'oapl_engine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
