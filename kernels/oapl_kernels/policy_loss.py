"""Policy loss of a vocabulary head in one pass: 6 T D V operations with gradients, never a [T, V] tensor.

d loss / d logits of token t is g_t * (onehot - softmax), and g_t is known at the end of its sequence at the latest.
Chunks end at sequence ends, so each chunk's gradient products follow its logits at once. Only a sequence longer
than a chunk whose coefficient is one scalar known at its end is deferred: its unscaled gradient waits.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, MASKS, check_head, check_logprob, check_offsets, check_target, check_tensor
from .chunks import Chunk, plan_chunks
from .compiler import opaque
from .head import Head, HeadOptions, compute_dtype
from .matmul import WeightGradient, hidden_product, wide
from .objectives import oapl
from .objectives.objective import LossFunction, Objective, PolicyInputs
from .scratch import scratch
from .sequence import sequence_sum, spread
from .vocabulary import Vocabulary, group_name


class PolicyLoss(NamedTuple):
    """loss (), differentiable; logprob [T], entropy [T] (0 at ignored targets) and sequence_logprob [N], which are
    not. fp32, or fp64 for fp64 inputs."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    sequence_logprob: Tensor


def evaluate(
    functions: list[LossFunction], logprob: Tensor, inputs: PolicyInputs, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss () of whole sequences and, if asked for, its derivative by each log-prob [t]."""
    with torch.set_grad_enabled(derivative):
        leaf = logprob.detach().requires_grad_(derivative)
        loss = leaf.new_zeros(())
        for fn in functions:
            term = fn(leaf, inputs)
            if not isinstance(term, Tensor) or term.dim() != 0:
                shape = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
                raise ValueError(f"the objective returned {shape}; allowed: a tensor of shape [], the summed loss")
            loss = loss + term
        if not derivative:
            return loss, None
        if not loss.requires_grad:
            return loss, torch.zeros_like(leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class _Deferred:
    """The unscaled gradient of one sequence longer than a chunk, until its coefficient is known.

    The weight's part waits as rows of the logits' gradient while they are smaller than a second weight gradient
    (in bf16: up to 2 D tokens), else as that accumulator.
    """

    def __init__(self, head: Head, length: int, main: WeightGradient, hidden_size: int):
        device, dtype = head.weight.device, head.gradient_dtype
        self.hidden = scratch(length, hidden_size, dtype=dtype, device=device)
        self.rows: Tensor | None = None
        self.sums: WeightGradient | None = None  # None: each token may have a coefficient of its own
        if main.weight is None and main.bias is None:
            return
        if length * dtype.itemsize <= hidden_size * head.dtype.itemsize:
            self.rows = scratch(length, len(head.weight), dtype=dtype, device=device)
        else:
            self.sums = WeightGradient(
                None if main.weight is None else head.new(*main.weight.shape),
                None if main.bias is None else head.new(*main.bias.shape),
                empty=True,
            )

    def add(self, head: Head, grad: Tensor, hidden: Tensor, place: slice, want_hidden: bool) -> None:
        if want_hidden:
            hidden_product(grad, head.weight, self.hidden[place])
        if self.rows is not None:
            self.rows[place] = grad
        elif self.sums is not None:
            self.sums.add(grad, hidden)

    def close(self, coefficient: Tensor, trained: Tensor, hidden: Tensor, main: WeightGradient, name: str) -> None:
        """coefficient [L]; adds the weight's part to main. `hidden`'s own part is left in self.hidden."""
        if self.rows is not None:
            for start in range(0, len(self.rows), 64):  # in blocks: the product is fp32 before it is narrowed
                self.rows[start : start + 64].mul_(coefficient[start : start + 64, None])
            main.add(self.rows, hidden)
        elif self.sums is not None:
            values = coefficient[trained]
            scale = values.sum() / max(1, len(values))
            if len(values) and (values - scale).abs().max() > 1e-4 * values.abs().max():
                raise ValueError(
                    f"objective {name!r} has scope 'sequence' but its derivative varies from "
                    f"{float(values.min()):.3g} to {float(values.max()):.3g} within a sequence of {len(coefficient)} "
                    f"tokens; allowed: one value a sequence. Use scope 'token', or chunk_tokens >= {len(coefficient)}"
                )
            main.add_scaled(self.sums, scale)


class _Call(NamedTuple):
    """The arguments of `fused_policy_loss` that autograd does not look at."""

    target: Tensor
    offsets: list[int]
    objective: Objective
    inputs: PolicyInputs
    normalizer: float
    entropy_coefficient: float
    weight_grad: Tensor | None
    options: HeadOptions
    wants: tuple[bool, bool, bool]


@dataclass
class _SinglePass:
    """One pass over the chunks; see the module's docstring."""

    head: Head
    hidden: Tensor
    call: _Call
    hidden_gradient: Tensor | None
    main: WeightGradient

    def __post_init__(self) -> None:
        self.functions = [fn for fn in (self.call.objective.fn, self.call.objective.token_fn) if fn is not None]
        # Until a token's chunk is done its log-prob holds a finite stand-in: see _token_piece.
        self.trained = torch.as_tensor(self.call.inputs.mask)
        self.logprob = torch.where(self.trained, self.call.inputs.behavior_logprob, 0).to(self.head.dtype)
        self.entropy = torch.zeros_like(self.logprob)
        self.loss = self.logprob.new_zeros((), dtype=torch.float64)  # parts may cancel
        self.want_weight = self.main.weight is not None or self.main.bias is not None
        self.differentiate = self.want_weight or self.hidden_gradient is not None
        self.entropy_row = None
        if self.call.entropy_coefficient:
            self.entropy_row = self.trained.to(self.head.dtype) * (
                -self.call.entropy_coefficient / self.call.normalizer
            )
        self.deferred: _Deferred | None = None
        self.spare: Tensor | None = None

    def run(self, offsets: list[int]) -> None:
        for chunk in plan_chunks(offsets, self.head.chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            sequence = slice(offsets[chunk.first], offsets[chunk.last])
            logits = self.head.logits(self.hidden[rows])
            stats = self.head.statistics(logits, self.call.target[rows])
            self.logprob[rows], self.entropy[rows] = stats[0], stats[1]
            part = self.call.inputs.sequences(chunk.first, chunk.last, sequence.start, sequence.stop)
            if chunk.piece and self.call.objective.scope == "sequence":
                self._sequence_piece(chunk, sequence, part, logits, stats)
            else:
                self._known(chunk, sequence, part, logits, stats)
        if self.entropy_row is not None:
            self.loss += (self.entropy_row.double() * self.entropy).sum()
        self.main.finish()

    def _evaluate(
        self, functions: list[LossFunction], sequence: slice, part: PolicyInputs
    ) -> tuple[Tensor, Tensor | None]:
        loss, derivative = evaluate(functions, self.logprob[sequence], part, self.differentiate)
        if derivative is not None:
            derivative = torch.where(self.trained[sequence], derivative, 0).to(self.head.dtype) / self.call.normalizer
        return loss.double() / self.call.normalizer, derivative

    def _known(self, chunk: Chunk, sequence: slice, part: PolicyInputs, logits: Tensor, stats: Tensor) -> None:
        """Whole sequences, or a piece under a token objective: there the derivative at the piece's own tokens does
        not depend on the later ones, so stand-ins do for those, and the loss is taken when all are known."""
        loss, derivative = self._evaluate(self.functions, sequence, part)
        if chunk.end == sequence.stop:
            self.loss += loss
        if derivative is not None:
            own = derivative[chunk.start - sequence.start : chunk.end - sequence.start]
            self._products(chunk, logits, stats, own)

    def _sequence_piece(self, chunk: Chunk, sequence: slice, part: PolicyInputs, logits: Tensor, stats: Tensor) -> None:
        place = slice(chunk.start - sequence.start, chunk.end - sequence.start)
        if self.differentiate:
            if self.deferred is None:
                length = sequence.stop - sequence.start
                self.deferred = _Deferred(self.head, length, self.main, self.hidden.shape[1])
            at_once = self.functions[len(self._waiting()) :]
            if at_once or self.entropy_row is not None:
                # Not a multiple of the row that waits: gradient products of its own.
                _, derivative = self._evaluate(at_once, sequence, part)
                self._products(chunk, self._copy(logits), stats, torch.as_tensor(derivative)[place])
            elif self.hidden_gradient is not None:
                self.hidden_gradient[chunk.start : chunk.end].zero_()
            ones = self.trained[chunk.start : chunk.end].to(self.head.dtype)
            grad = self.head.gradient(logits, self.call.target[chunk.start : chunk.end], stats, ones, None)
            hidden = self.hidden[chunk.start : chunk.end]
            self.deferred.add(self.head, grad, hidden, place, self.hidden_gradient is not None)
        if chunk.end == sequence.stop:
            self._close(sequence, part)

    def _waiting(self) -> list[LossFunction]:
        """The terms of the loss whose derivatives are applied at the sequence's end. One per token, as a KL penalty's,
        can be if rows wait; a sum over the tokens has room for one a sequence."""
        return self.functions[:1] if self.deferred is not None and self.deferred.sums is not None else self.functions

    def _close(self, sequence: slice, part: PolicyInputs) -> None:
        waiting = self._waiting()
        loss, derivative = self._evaluate(waiting, sequence, part)
        self.loss += loss + self._evaluate(self.functions[len(waiting) :], sequence, part)[0]
        if derivative is None or self.deferred is None:
            return
        self.deferred.close(
            derivative, self.trained[sequence], self.hidden[sequence], self.main, self.call.objective.name
        )
        if self.hidden_gradient is not None:
            own = self.hidden_gradient[sequence]
            own.copy_(own + self.deferred.hidden * derivative[:, None])
        self.deferred = None

    def _copy(self, logits: Tensor) -> Tensor:
        if self.spare is None:
            self.spare = self.head.new(self.head.rows, logits.shape[1])
        return self.spare[: len(logits)].copy_(logits)

    def _products(self, chunk: Chunk, logits: Tensor, stats: Tensor, coefficient: Tensor) -> None:
        if chunk.start == chunk.end:  # sequences whose tokens are all ignored
            return
        rows = slice(chunk.start, chunk.end)
        entropy_row = None if self.entropy_row is None else self.entropy_row[rows]
        grad = self.head.gradient(logits, self.call.target[rows], stats, coefficient, entropy_row)
        if self.hidden_gradient is not None:
            hidden_product(grad, self.head.weight, self.hidden_gradient[rows])
        if self.want_weight:
            self.main.add(grad, self.hidden[rows])


class _FusedPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            head = Head(weight, bias, call.options, len(hidden))
            want_hidden, want_weight, want_bias = call.wants
            given = call.weight_grad
            weight_sum = given if given is not None else head.new(*weight.shape) if want_weight else None
            bias_sum = head.new(len(weight)) if want_bias else None
            main = WeightGradient(weight_sum, bias_sum, empty=given is None)
            # fp16 cannot hold unscaled policy gradients: they are narrowed after the upstream gradient.
            kept = head.dtype if dtype == torch.float16 else dtype
            hidden_sum = scratch(*hidden.shape, dtype=kept, device=hidden.device) if want_hidden else None
            call = call._replace(target=head.vocabulary.local_target(call.target))
            single = _SinglePass(head, hidden, call, hidden_sum, main)
            single.run(call.offsets)
            if hidden_sum is not None:
                head.vocabulary.reduce(hidden_sum)
        ctx.gradients = [hidden_sum, None if given is not None else weight_sum, bias_sum]
        ctx.added = given is not None
        ctx.mark_non_differentiable(single.logprob, single.entropy)
        ctx.set_materialize_grads(False)
        return single.loss.to(head.dtype), single.logprob, single.entropy

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = upstreams[0]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this fused_policy_loss were already handed out; call it again instead")
        gradients, ctx.gradients = ctx.gradients, None
        if upstream is None:
            return None, None, None, None
        if ctx.added:
            _check_upstream(upstream)
        unchanged = upstream.device.type == "cpu" and upstream == 1
        for gradient in gradients:
            if gradient is not None and not unchanged:
                gradient.mul_(upstream)
        return (*(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None)


def _check_upstream(upstream: Tensor) -> None:
    """weight_grad was added to in the forward pass, where the upstream gradient is not known yet."""
    if upstream.device.type != "cpu":
        torch._assert_async(upstream == 1, "with weight_grad the gradient of loss must be 1: scale by normalizer")
    elif upstream != 1:
        raise ValueError(
            f"the gradient of loss is {float(upstream):.6g} with weight_grad given; allowed: 1, "
            "because weight_grad is added to in the forward pass. Scale by normalizer instead"
        )


def _complete(inputs: PolicyInputs, cu_seqlens: Tensor, counted: Tensor, tokens: int) -> PolicyInputs:
    """The inputs, checked, with a boolean mask and cu_seqlens filled in."""
    device = counted.device
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

    Gradients are computed here, in the forward pass; loss.backward() hands them out, once. With weight_grad
    [V, D] (fp32, fp64 for fp64 inputs) the weight's gradient is added there, at once, for an upstream gradient of 1,
    and none is returned. Under torch.no_grad, or if nothing requires a gradient, no gradient product runs.
    backend "auto" | "triton" | "torch" | "cpu"; process_group: weight and bias are this rank's rows of the vocabulary.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    same_dtype = compute_dtype(hidden) == hidden.dtype if isinstance(hidden, Tensor) else True
    check_head(hidden, weight, bias, temperature, softcap, chunk_tokens, same_dtype)
    tokens, device = len(hidden), hidden.device
    options = HeadOptions(temperature, softcap, chunk_tokens, backend, Vocabulary(weight, group_name(process_group)))
    counted = check_target(target, tokens, options.vocabulary.size, ignore_index, device)
    offsets = check_offsets("cu_seqlens", cu_seqlens, tokens, device)
    inputs = _complete(inputs, cu_seqlens, counted, tokens)
    if not 0 < normalizer < float("inf"):
        raise ValueError(f"normalizer is {normalizer}; allowed: a finite number > 0")
    if not abs(entropy_coefficient) < float("inf"):
        raise ValueError(f"entropy_coefficient is {entropy_coefficient}; allowed: a finite number")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective is a {type(objective).__name__}; allowed: an Objective")
    if weight_grad is not None:
        check_tensor("weight_grad", weight_grad, tuple(weight.shape), (wide(weight.dtype),), device)
    record = torch.is_grad_enabled()
    wants = (
        record and hidden.requires_grad,
        record and (weight.requires_grad or weight_grad is not None),
        record and bias is not None and bias.requires_grad,
    )
    added = weight_grad if record else None
    rows = None if counted.all() else counted.nonzero()[:, 0]
    if rows is not None:  # ignored tokens cost nothing: only the others reach the head
        before = torch.nn.functional.pad(counted.cumsum(0), (1, 0))[cu_seqlens.long()]
        hidden, target, inputs, offsets = hidden[rows], target[rows], inputs.rows(rows, before), before.tolist()
    call = _Call(target, offsets, objective, inputs, float(normalizer), entropy_coefficient, added, options, wants)
    loss, logprob, entropy = _FusedPolicyLoss.apply(hidden, weight, bias, call)
    sums = sequence_sum(logprob, inputs.offsets(), inputs.mask)
    if rows is not None:
        logprob, entropy = spread(logprob, rows, tokens), spread(entropy, rows, tokens)
    return PolicyLoss(loss, logprob, entropy, sums)


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

    behavior_logprob [T] of the tokens under the policy that generated them; advantage [N] (`group_advantage`);
    normalizer: sequences in the whole optimizer step, default N; mask [T] nonzero where a token is trained.
    The other keywords are those of `fused_policy_loss`.
    """
    inputs = PolicyInputs(behavior_logprob, advantage, mask=mask)
    if normalizer is None:
        normalizer = max(1, len(advantage))
    return fused_policy_loss(hidden, weight, target, cu_seqlens, oapl(beta2), inputs, normalizer=normalizer, **options)
