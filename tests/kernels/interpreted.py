"""Run by test_interpreter.py under TRITON_INTERPRET=1: every Triton kernel through the public API."""

from dataclasses import replace

import pytest
import torch
from head_reference import assert_within_twice, errors, fused, make_case, plain_autograd, relative_error
from oapl_kernels import head, linear_logprob, matmul, sequence_sum, weight_pack
from oapl_kernels.launches import INTERPRETED, LAUNCHES
from oapl_kernels.objectives import grpo, oapl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on -inf minus -inf in a lane not taken
LENGTHS = {"whole": [5, 1, 30, 17], "one": [1], "long": [3, 71, 2]}


@pytest.fixture(autouse=True)
def launched(request):
    """Each test names the kernels it must have launched."""
    assert INTERPRETED
    LAUNCHES.clear()
    yield
    for name in request.node.get_closest_marker("launches").args:
        assert LAUNCHES[name] > 0, f"{name} did not run: {dict(LAUNCHES)}"


def compare(lengths, dtype, objective=None, seeds=2, **options):
    ours, theirs = [], []
    for seed in range(seeds):
        case = make_case(objective or oapl(0.05), lengths, seed, dtype, **options)
        exact = plain_autograd(case.to(torch.float64))
        ours.append(errors(fused(case, chunk_tokens=16, backend="triton"), exact))
        theirs.append(errors(plain_autograd(case), exact))
    assert_within_twice(ours, theirs, dtype)


@pytest.mark.launches("row_statistics", "row_gradient", "sum_sequence")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_error_is_at_most_twice_that_of_torch(lengths, dtype):
    compare(lengths, dtype)


@pytest.mark.launches("row_statistics", "row_gradient")
def test_a_vocabulary_of_more_than_one_block():
    compare([20], torch.float32, vocabulary=9001, seeds=1)


@pytest.mark.launches("row_statistics", "row_gradient")
@pytest.mark.parametrize(("temperature", "softcap"), [(0.1, None), (10.0, None), (0.7, 3.0)])
def test_temperature_softcap_and_entropy(temperature, softcap):
    compare([7, 20], torch.float32, temperature=temperature, softcap=softcap, entropy_coefficient=0.02)


@pytest.mark.launches("row_gradient")
def test_bf16_rows_in_place(monkeypatch):
    """As on a GPU: the bf16 gradient over its own fp32 logits."""
    for module in (head, matmul):
        monkeypatch.setattr(module, "multiplies_natively", lambda dtype, device: dtype != torch.float16)
    compare([5, 71, 3], torch.bfloat16, objective=grpo())
    compare([20], torch.bfloat16, vocabulary=9001, seeds=1)


@pytest.mark.launches("row_statistics", "row_gradient")
def test_logits_of_ten_thousand():
    case = make_case(oapl(0.05), [20], 0, torch.float32)
    case = replace(case, hidden=case.hidden * 1e4)
    exact, found = plain_autograd(case.to(torch.float64)), fused(case, backend="triton")
    own = errors(plain_autograd(case), exact)
    assert relative_error(found["logprob"], exact["logprob"]) < 1e-6
    assert relative_error(found["weight"], exact["weight"]) <= 2 * own["weight"]


@pytest.mark.launches("row_gradient")
def test_everything_masked():
    case = make_case(oapl(0.05), [4, 40], 0, torch.float32)
    case = replace(case, inputs=replace(case.inputs, mask=torch.zeros(44, dtype=torch.bool)))
    assert (fused(case, chunk_tokens=16, backend="triton")["weight"] == 0).all()


@pytest.mark.launches
def test_no_tokens_launch_nothing():
    nothing = linear_logprob(torch.zeros(0, 4), torch.ones(5, 4), torch.zeros(0, dtype=torch.int64), backend="triton")
    assert nothing.shape == (0,)
    assert not LAUNCHES


@pytest.mark.launches("score_tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "depth", "vocabulary"), [(1, 16, 2), (130, 33, 257), (37, 64, 300)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scoring_without_logits(dtype, tokens, depth, vocabulary, softcap):
    options = {"depth": depth, "vocabulary": vocabulary, "softcap": softcap, "temperature": 0.8}
    case = make_case(oapl(0.05), [tokens], 0, dtype, **options)
    exact, own = plain_autograd(case.to(torch.float64)), plain_autograd(case)
    keywords = {"bias": case.bias, "temperature": 0.8, "softcap": softcap, "return_entropy": True}
    logprob, entropy = linear_logprob(case.hidden, case.weight, case.target, backend="triton", **keywords)
    for name, found in (("logprob", logprob), ("entropy", entropy)):
        limit = max(2 * relative_error(own[name], exact[name]), 1e-6)
        assert relative_error(found, exact[name]) <= limit


@pytest.mark.launches("row_gradient")
def test_gradient_of_log_probs():
    case = make_case(grpo(), [40], 0, torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    exact = case.weight.double().requires_grad_()
    linear_logprob(case.hidden, weight, case.target, backend="triton", chunk_tokens=16).sum().backward()
    linear_logprob(case.hidden.double(), exact, case.target, backend="torch").sum().backward()
    assert relative_error(weight.grad, exact.grad) < 4e-3


@pytest.mark.launches("sum_sequence")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequence_sums(dtype):
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.arange(3000) % 7 != 0
    offsets = torch.tensor([0, 1, 2500, 3000])
    found = sequence_sum(values, offsets, mask)
    exact = torch.stack([part.double().sum() for part in torch.where(mask, values, 0).split([1, 2499, 500])])
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=1e-6)


@pytest.mark.launches("pack_block")
@pytest.mark.parametrize("dtype", weight_pack.CASTS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 9001])
def test_weights_are_packed_as_on_cpu(count, dtype, monkeypatch):
    source = torch.randn(count, generator=torch.Generator().manual_seed(count))
    payload, other = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    found = weight_pack.checksums([weight_pack.pack(source, payload)])
    monkeypatch.setattr(weight_pack, "runs_triton", lambda tensor: False)
    assert found == weight_pack.checksums([weight_pack.pack(source, other)])
    assert torch.equal(payload, other)


@pytest.mark.launches("pack_block")
def test_packing_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="payload 0 holds 1 values"):
        weight_pack.checksums([weight_pack.pack(torch.tensor([1.0, torch.nan]), torch.empty(2, dtype=torch.bfloat16))])
