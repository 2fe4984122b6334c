import pytest
import torch
from oapl_kernels import Objective, linear_logprob
from oapl_kernels.objectives import oapl
from oapl_kernels.testing import Products

from tests.support.head_reference import CPU, ODD, compare, make_case, odd_case, through_logprob

WEIGHTED = Objective("weighted", "token", lambda lp, i: (lp * i.behavior_logprob * i.mask).sum())


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.1])
def test_error_is_at_most_twice_that_of_torch(dtype, softcap, entropy_coefficient, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 runs on the torch backend alone")
    options = {"softcap": softcap, "temperature": 1.3, "entropy_coefficient": entropy_coefficient}
    compare(through_logprob, lambda seed: make_case(WEIGHTED, [83], seed, dtype, **options), dtype, backend=backend)


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_odd_cases(name, dtype, backend):
    compare(through_logprob, lambda seed: odd_case(name, oapl(0.05), seed, dtype), dtype, backend=backend)


def test_ignored_tokens_are_zero_and_without_gradient():
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5)
    logprob, entropy = linear_logprob(
        hidden, weight, torch.tensor([1, -1, 2, -1, 3, 6]), ignore_index=-1, return_entropy=True
    )
    assert (logprob[[1, 3]] == 0).all()
    assert (entropy[[1, 3]] == 0).all()
    (logprob.sum() + entropy.sum()).backward()
    assert (hidden.grad[[1, 3]] == 0).all()
    assert (hidden.grad[[0, 2, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize(("training", "units"), [(False, 2), (True, 8)])
def test_scoring_is_one_product_and_training_three_more(training, units):
    hidden, weight = torch.randn(40, 16, requires_grad=training), torch.randn(64, 16, requires_grad=training)
    with Products() as meter:
        logprob = linear_logprob(hidden, weight, torch.arange(40), chunk_tokens=16, backend="torch")
        if training:
            logprob.sum().backward()
    assert meter.flops == units * 40 * 16 * 64


def test_bias_of_minus_infinity_closes_part_of_the_vocabulary():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    bias = torch.zeros(20)
    bias[12:] = -torch.inf
    logprob, entropy = linear_logprob(hidden, weight, torch.arange(5), bias=bias, return_entropy=True, backend="torch")
    exact = torch.log_softmax(hidden @ weight[:12].T, -1)
    torch.testing.assert_close(logprob, exact[range(5), range(5)])
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(1))
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad[12:] == 0).all()


def test_no_tokens():
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprob = linear_logprob(hidden, torch.randn(5, 4), torch.zeros(0, dtype=torch.int64))
    logprob.sum().backward()
    assert logprob.shape == (0,)
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": torch.tensor([0, 5])}, r"target\[1\] is 5; allowed: 0 to 4, or ignore_index -100"),
        ({"target": [0, 1]}, r"target is a list; allowed: a tensor"),
        ({"target": torch.arange(3)}, r"target has shape \[3\]; allowed: \[2\]"),
        ({"target": torch.arange(2, device="meta")}, r"target is on meta; allowed: cpu"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \[5, 3\]; allowed: \[any, 4\]"),
        ({"weight": torch.zeros(0, 4)}, r"weight has 0 rows; allowed: a vocabulary of at least 1"),
        ({"weight": torch.zeros(5, 4).half()}, r"weight has dtype torch.float16 but hidden has torch.float32"),
        ({"bias": torch.zeros(5).long()}, r"bias has dtype int64; allowed: bfloat16"),
        ({"temperature": float("nan")}, r"temperature is nan; allowed"),
        ({"backend": "cuda"}, r"backend is 'cuda'; allowed: 'auto'"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**good | wrong)
