import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oapl_kernels import sequence_sum


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99), masked=st.booleans())
def test_sums_are_the_exact_ones_rounded_once(lengths, seed, masked):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=random)
    mask = torch.rand(sum(lengths), generator=random) > 0.3 if masked else None
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    kept = values if mask is None else torch.where(mask, values, 0)
    exact = [torch.tensor(math.fsum(part.tolist())).item() for part in kept.split(lengths)]
    torch.testing.assert_close(sequence_sum(values, cu_seqlens, mask), torch.tensor(exact), rtol=1.2e-7, atol=1e-12)


def test_a_long_sum_of_log_ratios_keeps_what_a_bf16_sum_loses():
    values = torch.randn(16384, generator=torch.Generator().manual_seed(0)) * 0.1
    exact = math.fsum(values.tolist())
    assert abs(float(sequence_sum(values, torch.tensor([0, 16384]))) - exact) < 1e-5
    assert abs(float(values.bfloat16().cumsum(0)[-1]) - exact) > 1e-2


def test_gradient_is_the_upstream_value_at_each_unmasked_token():
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: sequence_sum(x, cu_seqlens, mask), values)


def test_masked_nan_does_not_reach_the_sum():
    assert float(sequence_sum(torch.tensor([1.0, torch.nan]), torch.tensor([0, 2]), torch.tensor([1, 0]))) == 1


def test_no_sequences_sum_to_nothing():
    assert sequence_sum(torch.zeros(0), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_values_are_summed_in_fp32(dtype):
    found = sequence_sum(torch.full((4096,), 1.0, dtype=dtype), torch.tensor([0, 4096]))
    assert found.dtype == torch.float32
    assert float(found) == 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 1), torch.tensor([0, 4])), r"token_values has shape \[4, 1\]; allowed: \[any\]"),
        ((torch.zeros(4), torch.tensor([0.0, 4.0])), r"cu_seqlens has dtype float32; allowed: int32, int64"),
        ((torch.zeros(4), torch.tensor([0, 9])), r"cu_seqlens runs from 0 to 9; allowed: from 0 to 4"),
        ((torch.zeros(4), torch.tensor([0, 3, 2, 4])), r"cu_seqlens\[2\] is 2 after 3; allowed: never decreasing"),
        ((torch.zeros(4), torch.tensor([0, 4]), torch.ones(3)), r"mask has shape \[3\]; allowed: \[4\]"),
        ((torch.zeros(4), torch.tensor([0, 4], device="meta")), r"cu_seqlens is on meta; allowed: cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_sum(*arguments)
