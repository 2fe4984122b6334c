"""Per-token log-probs of a vocabulary head, chunk by chunk; the backward pass recomputes the logits."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_head, check_target
from .compiler import opaque
from .head import Head, HeadOptions, compute_dtype
from .matmul import WeightGradient, hidden_product
from .scratch import scratch
from .sequence import spread
from .vocabulary import Vocabulary


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            head = Head(weight, bias, options, len(hidden))
            local = head.vocabulary.local_target(target)
            stats = scratch(4, len(hidden), dtype=head.dtype, device=hidden.device)
            for rows in _chunks(len(hidden), head.chunk_tokens):
                stats[:, rows] = head.score(hidden[rows], local[rows])
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, local, stats)
        ctx.set_materialize_grads(False)
        return stats[0], stats[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprob, by_entropy = upstream
        hidden, weight, bias, target, stats = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        head = Head(weight, bias, ctx.options, len(hidden))
        coefficient = torch.zeros_like(stats[0]) if by_logprob is None else by_logprob
        kept = head.dtype if hidden.dtype == torch.float16 else hidden.dtype
        hidden_sum = scratch(*hidden.shape, dtype=kept, device=hidden.device) if want_hidden else None
        main = WeightGradient(
            head.new(*weight.shape) if want_weight else None, head.new(len(weight)) if want_bias else None, empty=True
        )
        for rows in _chunks(len(hidden), head.chunk_tokens):
            logits = head.logits(hidden[rows])
            by_row = None if by_entropy is None else by_entropy[rows]
            grad = head.gradient(logits, target[rows], stats[:, rows], coefficient[rows], by_row)
            if hidden_sum is not None:
                hidden_product(grad, weight, hidden_sum[rows])
            if want_weight or want_bias:
                main.add(grad, hidden[rows])
        main.finish()
        if hidden_sum is not None:
            head.vocabulary.reduce(hidden_sum)
        gradients = (hidden_sum, main.weight, main.bias)
        return (
            *(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)),
            None,
            None,
        )


def _chunks(tokens: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


@opaque
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
    a policy loss `fused_policy_loss` needs 6 in all. The keywords are those of `fused_policy_loss`.
    """
    same_dtype = compute_dtype(hidden) == hidden.dtype if isinstance(hidden, Tensor) else True
    check_head(hidden, weight, bias, temperature, softcap, chunk_tokens, same_dtype)
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, Vocabulary(weight, process_group))
    counted = check_target(target, len(hidden), options.vocabulary.size, ignore_index, hidden.device)
    rows = None if counted.all() else counted.nonzero()[:, 0]
    if rows is not None:  # ignored tokens cost nothing: only the others reach the head
        hidden, target = hidden[rows], target[rows]
    logprob, entropy = _LinearLogprob.apply(hidden, weight, bias, target, options)
    if rows is not None:
        logprob, entropy = spread(logprob, rows, len(counted)), spread(entropy, rows, len(counted))
    return (logprob, entropy) if return_entropy else logprob
