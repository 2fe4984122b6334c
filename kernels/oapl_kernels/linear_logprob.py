"""Per-token log-probs of a vocabulary head, chunk by chunk; the backward pass recomputes the logits."""

from typing import Any

import torch
from torch import Tensor

from .checks import INTEGERS, check_head, check_target, check_tensor
from .compiler import operation
from .head import Head, HeadOptions, compute_dtype
from .matmul import accumulation_dtype, hidden_product
from .sequence import scatter_rows
from .vocabulary import Vocabulary, group_name


def _start(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    options: HeadOptions,
) -> tuple[Head, Tensor, Tensor, Tensor | None]:
    """The tokens that are not ignored: head, hidden [t, D], target [t] as rows of the head, position [t] in the batch.
    The others cost nothing. Without ignored tokens position is None."""
    vocabulary = Vocabulary(weight, options.group)
    counted = check_target(target, len(hidden), vocabulary.size, ignore_index, hidden.device)
    position = None if counted.all() else counted.nonzero()[:, 0]
    if position is not None:
        hidden, target = hidden[position], target[position]
    head = Head(weight.to(dtype), bias, options, vocabulary, len(hidden))
    return head, hidden.to(dtype), vocabulary.local_target(target), position


def _chunks(head: Head, tokens: int) -> list[slice]:
    return [slice(start, min(start + head.chunk_tokens, tokens)) for start in range(0, tokens, head.chunk_tokens)]


def _fake_gradients(wants: list[bool], by: object, also: object, stats: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    leaves = zip(wants, (inputs[0], inputs[1], inputs[3]), strict=True)
    return tuple(torch.empty_like(leaf) if wanted else stats.new_empty(0) for wanted, leaf in leaves)


@operation(_fake_gradients)
def head_logprob_backward(
    wants: list[bool],
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each like its tensor where wanted and empty where not."""
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, group)
    leaves, tokens = (hidden, weight, bias), len(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        head, hidden, target, position = _start(hidden, weight, target, bias, dtype, ignore_index, options)
        coefficient = torch.zeros_like(stats[0]) if by_logprob is None else by_logprob
        if position is not None:
            stats, coefficient = stats[:, position], coefficient[position]
            by_entropy = None if by_entropy is None else by_entropy[position]
        hidden_sum = head.hidden_gradient(hidden) if wants[0] else None
        main = head.weight_gradient(wants[1], wants[2])
        for rows in _chunks(head, len(hidden)):
            by_row = None if by_entropy is None else by_entropy[rows]
            grad = head.gradient(head.logits(hidden[rows]), target[rows], stats[:, rows], coefficient[rows], by_row)
            if hidden_sum is not None:
                hidden_product(grad, head.weight, hidden_sum[rows])
            main.add(grad, hidden[rows])
        main.finish()
        if hidden_sum is not None:
            head.vocabulary.reduce(hidden_sum)
            if position is not None:
                hidden_sum = scatter_rows(hidden_sum, position, tokens)
    found = zip((hidden_sum, main.weight, main.bias), leaves, strict=True)
    return tuple(stats.new_empty(0) if g is None or leaf is None else g.to(leaf.dtype) for g, leaf in found)  # type: ignore[return-value]


def _fake(hidden: Tensor, weight: Tensor, target: Tensor, bias: object, dtype: torch.dtype, *_: Any) -> list[Tensor]:
    return [hidden.new_empty(*shape, len(target), dtype=accumulation_dtype(dtype)) for shape in ((), (), (4,))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, stats = ctx.saved_tensors
    wants = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    found = head_logprob_backward(wants, by_logprob, by_entropy, stats, *inputs, *ctx.options)
    hidden, weight, bias = (g if wanted else None for g, wanted in zip(found, wants, strict=True))
    return hidden, weight, None, bias, *(None for _ in ctx.options)


@operation(_fake, save=_save, backward=_backward)
def head_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob [T], entropy [T] and, for backward, stats [4, T]; computed in dtype."""
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, group)
    tokens = len(target)
    with torch.autocast(hidden.device.type, enabled=False):
        head, hidden, target, position = _start(hidden, weight, target, bias, dtype, ignore_index, options)
        stats = torch.empty(4, len(hidden), dtype=head.dtype, device=hidden.device)
        for rows in _chunks(head, len(hidden)):
            stats[:, rows] = head.score(hidden[rows], target[rows])
    if position is not None:
        stats = stats.new_zeros(4, tokens).index_copy_(1, position, stats)
    return stats[0].clone(), stats[1].clone(), stats


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    process_group: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(softcap(z) / temperature)[target], z = hidden weight^T + bias -> [T], 0 at ignore_index.

    hidden [T, D], weight [V, D], bias [V], target [T]. Returns fp32 (fp64 for fp64 inputs), with return_entropy also
    the entropy [T]; both differentiable. 2 T D V operations, and 6 more in backward, which recomputes the logits: for
    a policy loss `fused_policy_loss` needs 6 in total. The keywords are those of `fused_policy_loss`.
    """
    dtype = compute_dtype(hidden) if isinstance(hidden, Tensor) else None
    check_head(hidden, weight, bias, temperature, softcap, chunk_tokens, same_dtype=dtype == hidden.dtype)
    check_tensor("target", target, (len(hidden),), INTEGERS, hidden.device)
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, group_name(process_group))
    logprob, entropy, _ = head_logprob(hidden, weight, target, bias, dtype, ignore_index, *options)
    return (logprob, entropy) if return_entropy else logprob
