import warnings

import torch
from oapl_kernels import linear_logprob, oapl_loss


def test_a_compiled_model_calls_the_operations_unchanged():
    layer, weight = torch.nn.Linear(16, 16), torch.nn.Parameter(torch.randn(50, 16))
    inputs, target, offsets = torch.randn(12, 16), torch.randint(0, 50, (12,)), torch.tensor([0, 5, 12])

    def loss(x):
        hidden = torch.relu(layer(x))
        score = linear_logprob(hidden, weight, target, chunk_tokens=5).mean()
        return oapl_loss(hidden, weight, target, offsets, torch.zeros(12), torch.ones(2), beta2=0.1).loss + score

    expected = torch.autograd.grad(loss(inputs), [layer.weight, weight])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not know how to trace.*")
        found = torch.autograd.grad(torch.compile(loss, backend="eager")(inputs), [layer.weight, weight])
    torch.testing.assert_close(found, expected)
