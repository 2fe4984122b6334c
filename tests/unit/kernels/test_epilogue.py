"""The C++ epilogue, on every instruction set this processor has, against the torch one in float64."""

import math

import pytest
import torch
from oapl_kernels import epilogue
from oapl_kernels.backend import extension

from tests.support.head_reference import NOT_BUILT

pytestmark = pytest.mark.skipif(extension() is None, reason=NOT_BUILT)


def inputs(rows, vocabulary, scale, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=random) * scale
    target = torch.randint(0, vocabulary, (rows,), generator=random)
    target[0], target[-1] = 0, vocabulary - 1
    return logits, target, torch.randn(rows, generator=random), torch.randn(rows, generator=random)


def run(module, logits, target, a, e, temperature, softcap, dtype):
    logits = logits.clone()
    stats = torch.empty(4, len(logits), dtype=logits.dtype)
    module.statistics(logits, target, temperature, softcap, stats)
    return stats, module.gradient(logits, target, stats, a, e, temperature, softcap, dtype).clone()


@pytest.mark.parametrize("vocabulary", [1, 3, 16, 31, 257, 4096, 9001])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 2.0)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_rows_match_float64(instruction_set, vocabulary, temperature, softcap, with_entropy):
    from oapl_kernels import epilogue_cpu

    logits, target, a, e = inputs(11, vocabulary, 3.0)
    e = e if with_entropy else None
    wide = None if e is None else e.double()
    exact, slope = run(epilogue, logits.double(), target, a.double(), wide, temperature, softcap, torch.float64)
    stats, gradient = run(epilogue_cpu, logits, target, a, e, temperature, softcap, torch.float32)
    torch.testing.assert_close(stats.double(), exact, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-5, atol=3e-7)
    _, narrow = run(epilogue_cpu, logits, target, a, e, temperature, softcap, torch.bfloat16)
    assert torch.equal(narrow, gradient.bfloat16())


def test_a_closed_part_of_the_vocabulary_has_no_probability(instruction_set):
    from oapl_kernels import epilogue_cpu

    logits, target, a, e = inputs(5, 5000, 1.0)
    logits[:, 100:4900] = -torch.inf
    logits[:, 4999] = -torch.inf
    target = torch.tensor([0, 7, 99, 4900, 4998])
    stats, gradient = run(epilogue_cpu, logits, target, a, e, 1.0, None, torch.float32)
    expected, _ = run(epilogue, logits, target, a, e, 1.0, None, torch.float32)
    torch.testing.assert_close(stats, expected)
    assert (gradient[:, 100:4900] == 0).all()


def test_nan_logits_stay_visible(instruction_set):
    from oapl_kernels import epilogue_cpu

    logits, target, a, _ = inputs(3, 100, 1.0)
    logits[1, 40] = torch.nan
    stats, gradient = run(epilogue_cpu, logits, target, a, None, 1.0, None, torch.bfloat16)
    assert torch.isnan(stats[0, 1])
    assert torch.isnan(gradient[1].float()).any()
    assert not torch.isnan(stats[:, [0, 2]]).any()


def test_one_thread_and_many_give_the_same_bits():
    from oapl_kernels import epilogue_cpu

    arguments = (*inputs(37, 501, 2.0), 1.0, None, torch.bfloat16)
    once = run(epilogue_cpu, *arguments)
    torch.set_num_threads(4)
    again = run(epilogue_cpu, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("count", [1, 17, 70001])
def test_accumulating_bf16_products_is_exact(instruction_set, count):
    sums = torch.randn(count)
    products = torch.randn(count).bfloat16()
    expected = sums + products.float()
    extension().accumulate(sums.data_ptr(), products.data_ptr(), count, True, 2)
    assert torch.equal(sums, expected)
    extension().accumulate(sums.data_ptr(), products.data_ptr(), count, False, 2)
    assert torch.equal(sums, products.float())


def test_log_probs_at_a_large_vocabulary_beat_log_softmax():
    """Design: 9e-7 at V=151936, where torch's fp32 log_softmax was biased by 0.5e-5 to 2e-5 a token."""
    from oapl_kernels import epilogue_cpu

    logits, target, a, _ = inputs(16, 151936, 3.0)
    exact = torch.log_softmax(logits.double(), -1).gather(1, target[:, None])[:, 0]
    stats, _ = run(epilogue_cpu, logits, target, a, None, 1.0, None, torch.float32)
    assert (stats[0].double() - exact).abs().max() < 2e-6
    assert math.isclose(
        float(stats[1].mean()),
        float(torch.distributions.Categorical(logits=logits.double()).entropy().mean()),
        rel_tol=1e-6,
    )
