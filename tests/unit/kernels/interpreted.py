"""Run by test_interpreter.py under TRITON_INTERPRET=1: every Triton kernel through the public API."""

import pytest
import torch
from oapl_kernels import epilogue_triton, head, linear_logprob, matmul, oapl_loss, sequence_sum, weight_pack
from oapl_kernels.launches import INTERPRETED
from oapl_kernels.objectives import grpo, oapl
from oapl_kernels.testing import LAUNCHES

from tests.support.head_reference import (
    ODD,
    compare,
    fused,
    make_case,
    odd_case,
    plain_autograd,
    relative_error,
    through_logprob,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on -inf minus -inf in a lane not taken


SHORT = ("one token", "smallest head", "softcap", "wider than a block")  # the interpreter takes seconds per case
CASES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in ODD]


@pytest.fixture(autouse=True)
def launched(request, monkeypatch):
    """Each test names the kernels it must have launched."""
    assert INTERPRETED
    if "wider" not in request.node.name:  # a row costs whole blocks
        monkeypatch.setattr(epilogue_triton, "BLOCK", 512)
    LAUNCHES.clear()
    yield
    for name in request.node.get_closest_marker("launches").args:
        assert LAUNCHES[name] > 0, f"{name} did not run: {dict(LAUNCHES)}"


@pytest.mark.launches("row_statistics", "row_gradient", "sum_sequence")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_odd_cases_of_the_policy_loss(name, dtype):
    compare(fused, lambda seed: odd_case(name, oapl(0.05), seed, dtype), dtype, backend="triton")


@pytest.mark.launches("row_gradient", "sum_sequence")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_odd_cases_of_log_probs(name, dtype):
    """fp32 logits come from the library, those of half precision are never in memory (score_tile)."""
    compare(through_logprob, lambda seed: odd_case(name, oapl(0.05), seed, dtype), dtype, backend="triton")
    assert LAUNCHES["score_tile" if dtype != torch.float32 else "row_statistics"] > 0


@pytest.mark.slow
@pytest.mark.launches("row_gradient")
def test_bf16_rows_in_place(monkeypatch):
    """As on a GPU: the bf16 gradient over its own fp32 logits."""
    for module in (head, matmul):
        monkeypatch.setattr(module, "multiplies_natively", lambda dtype, device: dtype != torch.float16)
    for name in ("more than four chunks", "wider than a block", "softcap"):
        make = lambda seed, name=name: odd_case(name, grpo(), seed, torch.bfloat16)  # noqa: E731
        compare(fused, make, torch.bfloat16, backend="triton")


@pytest.mark.launches
def test_no_tokens_launch_nothing():
    nothing = linear_logprob(torch.zeros(0, 4), torch.ones(5, 4), torch.zeros(0, dtype=torch.int64), backend="triton")
    assert nothing.shape == (0,)
    arguments = torch.zeros(0, 4), torch.ones(5, 4), nothing.long(), torch.tensor([0]), nothing, nothing
    assert float(oapl_loss(*arguments, beta2=1, backend="triton").loss) == 0
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
    found = weight_pack.pack(source, payload)
    monkeypatch.setattr(weight_pack, "runs_triton", lambda tensor: False)
    assert torch.equal(found, weight_pack.pack(source, other))
    assert torch.equal(payload, other)


@pytest.mark.launches("pack_block")
@pytest.mark.parametrize("dtype", weight_pack.CASTS, ids=str)
def test_packing_counts_what_is_not_finite(dtype):
    digest = weight_pack.pack(torch.tensor([1.0, torch.nan, -torch.inf]), torch.empty(3, dtype=dtype))
    assert int(digest[2]) == 2
