"""The head's three products on CPU, on every instruction set this processor has, against float64."""

import pytest
import torch
from oapl_kernels import matmul
from oapl_kernels.backend import extension
from oapl_kernels.objectives import grpo, oapl

from tests.support.head_reference import HALF, NOT_BUILT, compare, fused, make_case, relative_error

pytestmark = pytest.mark.skipif(extension() is None, reason=NOT_BUILT)

SHAPES = [
    (1, 1, 1),
    (7, 3, 5),
    (8, 48, 256),
    (9, 49, 257),
    (17, 257, 33),
    (16, 48, 513),
    (401, 500, 39),
    (50, 97, 1100),
]


def laid_out(rows, columns, dtype, transposed, random):
    """A random matrix inside NaN: what a product reads beyond its operand shows."""
    size = (columns + 3, rows + 5) if transposed else (rows + 5, columns + 3)
    around = torch.full(size, torch.nan, dtype=dtype)
    inside = around.t()[:rows, :columns] if transposed else around[:rows, :columns]
    inside.copy_(torch.randn(rows, columns, generator=random))
    return inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_product_is_that_of_float64(instruction_set, dtype, threads):
    if not extension().multiplies(dtype == torch.bfloat16):
        pytest.skip(f"{instruction_set} has no product in {dtype}")
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    for rows, columns, depth in SHAPES:
        for first, second in ((False, False), (False, True), (True, False), (True, True)):
            left = laid_out(rows, depth, dtype, first, random)
            right = laid_out(depth, columns, dtype, second, random)
            exact = left.double() @ right.double()
            around = torch.full((rows + 2, columns + 2), torch.nan)
            out = around[:rows, :columns]
            scale = left.double().norm(dim=1)[:, None] * right.double().norm(dim=0)
            sizes = rows, columns, depth, first, second
            for times in (1, 2):
                matmul.product(left, right, out, add=times == 2)
                assert ((out - times * exact).abs() <= 4e-7 * times * scale).all(), sizes
            assert around.isnan().sum() == around.numel() - out.numel()  # nothing is written beyond it


def test_which_instruction_sets_multiply(instruction_set):
    found = [extension().multiplies(bf16) for bf16 in (False, True)]
    assert found == [instruction_set in ("avx512", "avx512_bf16"), instruction_set == "avx512_bf16"]
    if not found[1]:
        bf16 = torch.ones(2, 2, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="instruction set"):
            matmul.product(bf16, bf16, torch.zeros(2, 2), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_multiplies_right_with_and_without_it(instruction_set, dtype):
    random = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*size, generator=random).to(dtype) for size in ((50, 39), (4500, 39)))
    logits = torch.full((50, 4500), torch.nan)
    matmul.project(hidden, weight, logits)
    assert relative_error(logits, hidden.double() @ weight.double().T) < 1e-6
    grad = logits.to(dtype)
    out = torch.full_like(hidden, torch.nan)
    matmul.hidden_product(grad, weight, out)
    assert relative_error(out, grad.double() @ weight.double()) < 4 * HALF[dtype]
    total = matmul.WeightGradient(torch.full((4500, 39), torch.nan), None)
    total.add(grad, hidden)
    total.add(grad, hidden)
    sums_in_fp32 = dtype == torch.float32 or matmul.sums_bf16_in_fp32(grad.t(), hidden)
    error = relative_error(total.weight, 2 * grad.double().T @ hidden.double())
    assert error < (1e-6 if sums_in_fp32 else 4 * HALF[dtype])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 33, 34, 64, 257, 4500, 4513])
def test_hidden_product_reads_nothing_beyond_rows(vocabulary, transposed):
    """The library's bf16 product with AMX reads up to a tile beyond each row of its left operand."""
    random = torch.Generator().manual_seed(2)
    for tokens in (1, 33, 50):
        grad = laid_out(tokens, vocabulary, torch.bfloat16, False, random)
        weight = laid_out(vocabulary, 39, torch.bfloat16, transposed, random)
        out = torch.full((tokens, 39), torch.nan, dtype=torch.bfloat16)
        matmul.hidden_product(grad, weight, out)
        assert relative_error(out, grad.double() @ weight.double()) < 4 * HALF[torch.bfloat16]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64])
def test_weight_product_reads_nothing_beyond_rows(tokens, transposed):
    """So does its product of the other side: here the depth is the number of tokens."""
    random = torch.Generator().manual_seed(3)
    for vocabulary, depth in ((1, 1), (33, 39), (257, 32)):
        grad = laid_out(tokens, vocabulary, torch.bfloat16, False, random)
        hidden = laid_out(tokens, depth, torch.bfloat16, transposed, random)
        total = matmul.WeightGradient(torch.full((vocabulary, depth), torch.nan), None)
        total.add(grad, hidden)
        assert relative_error(total.weight, grad.double().T @ hidden.double()) < 4 * HALF[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [oapl(0.05), grpo()], ids=lambda objective: objective.name)
def test_the_loss_is_right_on_every_instruction_set(instruction_set, dtype, objective):
    compare(fused, lambda seed: make_case(objective, [3, 71, 8, 2], seed, dtype, entropy_coefficient=0.01), dtype)
