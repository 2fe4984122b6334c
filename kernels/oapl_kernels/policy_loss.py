"""Policy loss of a vocabulary head in one pass: 6 T D V operations with gradients, never a [T, V] tensor.

The pass itself is in single_pass.py.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, MASKS, check_head, check_logprob, check_offsets, check_target, check_tensor
from .compiler import opaque
from .head import Head, HeadOptions, compute_dtype
from .matmul import accumulation_dtype
from .objectives.oapl import oapl
from .objectives.objective import Objective, PolicyInputs
from .sequence import scatter_rows, sequence_sum
from .single_pass import SinglePass
from .vocabulary import Vocabulary, group_name


class PolicyLoss(NamedTuple):
    """Results in fp32, or fp64 for fp64 inputs.

    loss ()               differentiable; the others are not
    logprob [T]           of the targets, nats per token; 0 at ignored targets
    entropy [T]           of the predicted distributions, nats per token; 0 at ignored targets
    sequence_logprob [N]  sums of logprob over each sequence's trained tokens
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    sequence_logprob: Tensor


class _Call(NamedTuple):
    """The arguments of `fused_policy_loss` that autograd does not differentiate; ignored tokens are left out."""

    target: Tensor
    objective: Objective
    inputs: PolicyInputs
    normalizer: float
    entropy_coefficient: float
    weight_grad: Tensor | None
    options: HeadOptions
    vocabulary: Vocabulary


class _FusedPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight.to(dtype), bias, call.options, call.vocabulary, len(hidden))
            single_pass = _prepare(head, hidden.to(dtype), call, wanted)
            loss = single_pass.run(call.inputs.offsets().tolist())
            if single_pass.hidden_gradient is not None:
                head.vocabulary.reduce(single_pass.hidden_gradient)
        ctx.added = call.weight_grad is not None
        weight_sum = None if ctx.added else single_pass.main.weight
        ctx.gradients = [single_pass.hidden_gradient, weight_sum, single_pass.main.bias]
        ctx.mark_non_differentiable(single_pass.logprob, single_pass.entropy)
        ctx.set_materialize_grads(False)
        return loss.to(head.dtype), single_pass.logprob, single_pass.entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this fused_policy_loss were already handed out; call it again instead")
        gradients, ctx.gradients = ctx.gradients, None
        if upstream is None:
            return None, None, None, None, None
        if ctx.added:
            _check_upstream(upstream)
        unchanged = upstream.device.type == "cpu" and upstream == 1
        for gradient in gradients:
            if gradient is not None and not unchanged:
                gradient.mul_(upstream)
        returned = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *returned, None, None


def _prepare(head: Head, hidden: Tensor, call: _Call, wanted: tuple[bool, ...]) -> SinglePass:
    """The pass, with memory for what it fills in; wanted: whether hidden, weight and bias need a gradient."""
    want_hidden, want_weight, want_bias = wanted
    given, trained = call.weight_grad, call.inputs.mask
    assert trained is not None  # _complete
    main = head.weight_gradient(want_weight and given is None, want_bias)
    if given is not None:
        main.finish()  # the bias's gradient starts at zero, the weight's at what is there
        main.weight = given
    logprob = torch.where(trained, call.inputs.behavior_logprob, 0).to(head.dtype)
    by_entropy = -call.entropy_coefficient / call.normalizer
    return SinglePass(
        head=head,
        hidden=hidden,
        target=head.vocabulary.local_target(call.target),
        objective=call.objective,
        inputs=call.inputs,
        trained=trained,
        normalizer=call.normalizer,
        entropy_row=trained.to(head.dtype) * by_entropy if by_entropy else None,
        hidden_gradient=head.hidden_gradient(hidden) if want_hidden else None,
        main=main,
        logprob=logprob,
        entropy=torch.zeros_like(logprob),
    )


def _check_upstream(upstream: Tensor) -> None:
    """weight_grad was added to in the forward pass, where the upstream gradient is not known yet."""
    if upstream.device.type != "cpu":
        torch._assert_async(upstream == 1, "with weight_grad the gradient of loss must be 1: scale by normalizer")
    elif upstream != 1:
        raise ValueError(
            f"the gradient of loss is {float(upstream):.6g} with weight_grad given; allowed: 1, "
            "because weight_grad is added to in the forward pass. Scale by normalizer instead"
        )


def _complete(inputs: PolicyInputs, cu_seqlens: Tensor, counted: Tensor) -> PolicyInputs:
    """The inputs, checked, with a boolean mask and cu_seqlens filled in."""
    tokens, device = len(counted), counted.device
    check_offsets("cu_seqlens", cu_seqlens, tokens, device)
    trained = counted
    if inputs.mask is not None:
        check_tensor("mask", inputs.mask, (tokens,), MASKS, device)
        trained = counted & (inputs.mask != 0)
    check_tensor("advantage", inputs.advantage, (len(cu_seqlens) - 1,), FLOATS, device)
    finite = torch.isfinite(inputs.advantage)
    if not finite.all():
        raise ValueError(f"advantage has {float(inputs.advantage[~finite][0])}; allowed: finite numbers")
    for name in ("behavior_logprob", "proximal_logprob", "reference_logprob"):
        check_logprob(name, getattr(inputs, name), tokens, trained, device)
    return replace(inputs, mask=trained, cu_seqlens=cu_seqlens)


def _check_loss(call: _Call, weight: Tensor) -> None:
    if not 0 < call.normalizer < float("inf"):
        raise ValueError(f"normalizer is {call.normalizer}; allowed: a finite number > 0")
    if not abs(call.entropy_coefficient) < float("inf"):
        raise ValueError(f"entropy_coefficient is {call.entropy_coefficient}; allowed: a finite number")
    if not isinstance(call.objective, Objective):
        raise ValueError(f"objective is a {type(call.objective).__name__}; allowed: an Objective")
    if call.weight_grad is not None:
        dtype = accumulation_dtype(weight.dtype)
        check_tensor("weight_grad", call.weight_grad, tuple(weight.shape), (dtype,), weight.device)


def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, counted: Tensor) -> PolicyLoss:
    """The loss of the tokens that are counted; ignored ones cost nothing, because they do not reach the head."""
    record = torch.is_grad_enabled()
    wanted = tuple(record and leaf is not None and leaf.requires_grad for leaf in (hidden, weight, bias))
    if not record:
        call = call._replace(weight_grad=None)
    rows = None if counted.all() else counted.nonzero()[:, 0]
    if rows is not None:
        before = torch.nn.functional.pad(counted.cumsum(0), (1, 0))[call.inputs.offsets().long()]
        hidden = hidden[rows]
        call = call._replace(target=call.target[rows], inputs=call.inputs.rows(rows, before))
    loss, logprob, entropy = _FusedPolicyLoss.apply(hidden, weight, bias, call, wanted)
    sums = sequence_sum(logprob, call.inputs.offsets(), call.inputs.mask)
    if rows is not None:
        logprob, entropy = (scatter_rows(values, rows, len(counted)) for values in (logprob, entropy))
    return PolicyLoss(loss, logprob, entropy, sums)


@opaque
def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    inputs: PolicyInputs,
    *,
    normalizer: float,
    entropy_coefficient: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    process_group: object | None = None,
) -> PolicyLoss:
    """loss = (objective(log-probs) - entropy_coefficient * sum of trained tokens' entropies) / normalizer.

    hidden [T, D], weight [V, D], bias [V]; target [T] is the token that position t predicts, or ignore_index;
    cu_seqlens [N+1] offsets of the sequences. log-prob = log_softmax(softcap(z) / temperature)[target],
    z = hidden weight^T + bias, softcap(z) = c tanh(z / c).

    Gradients are computed here, in the forward pass; loss.backward() returns them, once. With weight_grad [V, D] (fp32,
    fp64 for fp64 inputs) the weight's gradient is added there immediately, for an upstream gradient of 1, and none is
    returned. Under torch.no_grad, or if nothing requires a gradient, no gradient product runs.
    backend "auto" | "triton" | "torch" | "cpu"; process_group: weight and bias are this rank's rows of the vocabulary.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    same_dtype = compute_dtype(hidden) == hidden.dtype if isinstance(hidden, Tensor) else True
    check_head(hidden, weight, bias, temperature, softcap, chunk_tokens, same_dtype)
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, group_name(process_group))
    vocabulary = Vocabulary(weight, options.group)
    counted = check_target(target, len(hidden), vocabulary.size, ignore_index, hidden.device)
    inputs = _complete(inputs, cu_seqlens, counted)
    call = _Call(target, objective, inputs, normalizer, entropy_coefficient, weight_grad, options, vocabulary)
    _check_loss(call, weight)
    return _apply(hidden, weight, bias, call, counted)


def oapl_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    behavior_logprob: Tensor,
    advantage: Tensor,
    *,
    beta2: float,
    normalizer: float | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """OAPL's loss, 1/N sum_i (beta2 * sum_t [ln pi - ln pi_vllm] - A_i)^2 (arXiv 2602.19362).

    behavior_logprob [T]  of the tokens under the policy that generated them
    advantage [N]         one per sequence, see `group_advantage`
    normalizer            sequences in the complete optimizer step, default N
    mask [T]              nonzero where a token is trained
    The other keywords are those of `fused_policy_loss`.
    """
    inputs = PolicyInputs(behavior_logprob, advantage, mask=mask)
    if normalizer is None:
        normalizer = max(1, len(advantage))
    return fused_policy_loss(hidden, weight, target, cu_seqlens, oapl(beta2), inputs, normalizer=normalizer, **options)
