"""One pass over a batch: loss, log-probs and gradients of a policy loss in 6 T D V operations.

d loss / d logits of token t is g_t * (onehot - softmax), so three products are enough: logits, and the gradients of
hidden and of weight. They need g_t, which is known at the end of the token's sequence at the latest:
- complete sequences: g_t is known as soon as the chunk's logits are, and the products follow immediately;
- a sequence longer than a chunk, scope "token": g_t does not depend on later tokens, so it is known as early;
- a sequence longer than a chunk, scope "sequence": the unscaled gradient waits for the sequence's one coefficient.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .chunks import Long, Whole, plan_chunks
from .head import Head
from .matmul import WeightGradient, hidden_product
from .objectives.objective import LossFunction, Objective, PolicyInputs

ROWS_AT_A_TIME = 64  # scaled together: a product of bf16 rows is fp32 before it is rounded


def evaluate(
    functions: list[LossFunction], logprob: Tensor, inputs: PolicyInputs, derivative: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss () of complete sequences and its derivative by each log-prob [t], zeros if that is not wanted."""
    with torch.set_grad_enabled(derivative):
        leaf = logprob.detach().requires_grad_(derivative)
        loss = leaf.new_zeros(())
        for fn in functions:
            term = fn(leaf, inputs)
            if not isinstance(term, Tensor) or term.dim() != 0:
                shape = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
                raise ValueError(f"the objective returned {shape}; allowed: a tensor of shape [], the summed loss")
            loss = loss + term
        if not loss.requires_grad:
            return loss, torch.zeros_like(leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class UnscaledGradient:
    """The gradient of one long sequence without its coefficient.

    hidden  [L, D], the part of the hidden states
    rows    [L, V], the logits' gradient, from which the weight's part is multiplied at the end; kept while it is
            smaller than a second weight gradient (in bf16: up to 2 D tokens)
    sums    the weight's part, otherwise
    """

    def __init__(self, head: Head, length: int, main: WeightGradient, hidden_size: int):
        device, dtype = head.weight.device, head.gradient_dtype
        self.hidden = torch.empty(length, hidden_size, dtype=dtype, device=device)
        self.rows: Tensor | None = None
        self.sums: WeightGradient | None = None
        if not main.wanted:
            return
        if length * dtype.itemsize <= hidden_size * head.dtype.itemsize:
            self.rows = torch.empty(length, len(head.weight), dtype=dtype, device=device)
        else:
            self.sums = head.weight_gradient(main.weight is not None, main.bias is not None)

    def add(self, grad: Tensor, hidden: Tensor, place: slice) -> None:
        """The weight's part of a piece: grad [t, V], hidden [t, D], which are the tokens `place` of the sequence."""
        if self.rows is not None:
            self.rows[place] = grad
        elif self.sums is not None:
            self.sums.add(grad, hidden)

    def finish(self, coefficient: Tensor, trained: Tensor, hidden: Tensor, main: WeightGradient, name: str) -> None:
        """Add the weight's part, times the coefficient [L], to main."""
        if self.rows is not None:
            for rows, scale in zip(self.rows.split(ROWS_AT_A_TIME), coefficient.split(ROWS_AT_A_TIME), strict=True):
                rows.mul_(scale[:, None])
            main.add(self.rows, hidden)
        elif self.sums is not None:
            values = coefficient[trained]
            scale = values.sum() / max(1, len(values))
            if len(values) and (values - scale).abs().max() > 1e-4 * values.abs().max():
                raise ValueError(
                    f"objective {name!r} has scope 'sequence' but its derivative varies from "
                    f"{float(values.min()):.3g} to {float(values.max()):.3g} within a sequence of {len(coefficient)} "
                    f"tokens; allowed: one value per sequence. Use scope 'token', or chunk_tokens >= {len(coefficient)}"
                )
            main.add_scaled(self.sums, scale)


@dataclass(frozen=True)
class SinglePass:
    """What the pass reads, and the tensors that it fills in.

    head             on this rank's rows of the vocabulary
    hidden           [T, D], in the weight's dtype
    target           [T], rows of the head, -1 where another rank has them
    objective        summed loss on log-probs
    inputs           with cu_seqlens
    trained          [T], bool
    normalizer       what the loss is divided by
    entropy_row      [T], d loss / d entropy of each token, or None without an entropy term
    hidden_gradient  [T, D], filled in, or None if not wanted
    main             gradients of weight and bias, added to
    logprob          [T], filled in; before, a finite value for each token (see `_long_token`)
    entropy          [T], filled in
    """

    head: Head
    hidden: Tensor
    target: Tensor
    objective: Objective
    inputs: PolicyInputs
    trained: Tensor
    normalizer: float
    entropy_row: Tensor | None
    hidden_gradient: Tensor | None
    main: WeightGradient
    logprob: Tensor
    entropy: Tensor

    def run(self, offsets: list[int]) -> Tensor:
        """The loss (), fp64 because its parts may cancel."""
        functions = [fn for fn in (self.objective.fn, self.objective.token_fn) if fn is not None]
        loss = self.logprob.new_zeros((), dtype=torch.float64)
        for item in plan_chunks(offsets, self.head.chunk_tokens):
            first, last = item if isinstance(item, Whole) else (item.sequence, item.sequence + 1)
            tokens = slice(offsets[first], offsets[last])
            part = self.inputs.sequences(first, last, tokens.start, tokens.stop)
            if isinstance(item, Whole):
                loss += self._whole(functions, tokens, part)
            elif self.objective.scope == "token":
                loss += self._long_token(functions, item, tokens, part)
            else:
                loss += self._long_sequence(functions, item, tokens, part)
        if self.entropy_row is not None:
            loss += (self.entropy_row.double() * self.entropy).sum()
        self.main.finish()
        return loss

    def _whole(self, functions: list[LossFunction], tokens: slice, part: PolicyInputs) -> Tensor:
        """Complete sequences in one chunk."""
        logits, statistics = self._score(tokens)
        loss, derivative = self._evaluate(functions, tokens, part)
        self._multiply(tokens, logits, statistics, derivative)
        return loss

    def _long_token(self, functions: list[LossFunction], item: Long, tokens: slice, part: PolicyInputs) -> Tensor:
        """A long sequence, scope "token". The derivatives of a piece do not depend on the log-probs of later tokens,
        in whose place `logprob` holds other finite values. The loss is that of the last piece, when all are known."""
        for start, end in pairwise(item.cuts):
            logits, statistics = self._score(slice(start, end))
            loss, derivative = self._evaluate(functions, tokens, part)
            own = derivative[start - tokens.start : end - tokens.start]
            self._multiply(slice(start, end), logits, statistics, own)
        return loss

    def _long_sequence(self, functions: list[LossFunction], item: Long, tokens: slice, part: PolicyInputs) -> Tensor:
        """A long sequence, scope "sequence". The unscaled gradient waits for the coefficient. A derivative that varies
        from token to token, as that of a KL penalty, can wait as well if rows wait; sums have room for one coefficient
        per sequence, so such a term then has gradient products of its own, and so has the entropy in either case."""
        hidden, trained = self.hidden[tokens], self.trained[tokens]
        unscaled = UnscaledGradient(self.head, len(hidden), self.main, hidden.shape[1]) if self.differentiates else None
        waiting = functions[:1] if unscaled is not None and unscaled.sums is not None else functions
        immediate = functions[len(waiting) :]
        twice = self.differentiates and (len(immediate) > 0 or self.entropy_row is not None)
        copy = self.head.new(self.head.rows, len(self.head.weight)) if twice else None
        if self.hidden_gradient is not None:
            self.hidden_gradient[tokens].zero_()
        for start, end in pairwise(item.cuts):
            rows, place = slice(start, end), slice(start - tokens.start, end - tokens.start)
            logits, statistics = self._score(rows)
            if copy is not None:
                derivative = self._evaluate(immediate, tokens, part)[1]
                self._multiply(rows, copy[: end - start].copy_(logits), statistics, derivative[place])
            if unscaled is not None:
                ones = trained[place].to(self.head.dtype)
                grad = self.head.gradient(logits, self.target[rows], statistics, ones, None)
                if self.hidden_gradient is not None:
                    hidden_product(grad, self.head.weight, unscaled.hidden[place])
                unscaled.add(grad, hidden[place], place)
        loss, coefficient = self._evaluate(waiting, tokens, part)
        if unscaled is not None:
            unscaled.finish(coefficient, trained, hidden, self.main, self.objective.name)
            if self.hidden_gradient is not None:
                own = self.hidden_gradient[tokens]
                own.copy_(own + unscaled.hidden * coefficient[:, None])
        return loss + self._evaluate(immediate, tokens, part)[0]

    @property
    def differentiates(self) -> bool:
        """Whether a gradient is wanted."""
        return self.main.wanted or self.hidden_gradient is not None

    def _score(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Logits and statistics of these tokens, until the next call; their log-probs and entropies are kept."""
        logits = self.head.logits(self.hidden[rows])
        statistics = self.head.statistics(logits, self.target[rows])
        self.logprob[rows], self.entropy[rows] = statistics[0], statistics[1]
        return logits, statistics

    def _evaluate(self, functions: list[LossFunction], tokens: slice, part: PolicyInputs) -> tuple[Tensor, Tensor]:
        """Loss () of these sequences, and its derivative by each log-prob."""
        loss, derivative = evaluate(functions, self.logprob[tokens], part, self.differentiates)
        derivative = torch.where(self.trained[tokens], derivative, 0).to(self.head.dtype) / self.normalizer
        return loss.double() / self.normalizer, derivative

    def _multiply(self, rows: slice, logits: Tensor, statistics: Tensor, coefficient: Tensor) -> None:
        """The gradient products of these tokens, given d loss / d log-prob; none without tokens."""
        if not self.differentiates or rows.start == rows.stop:
            return
        entropy_row = None if self.entropy_row is None else self.entropy_row[rows]
        grad = self.head.gradient(logits, self.target[rows], statistics, coefficient, entropy_row)
        if self.hidden_gradient is not None:
            hidden_product(grad, self.head.weight, self.hidden_gradient[rows])
        self.main.add(grad, self.hidden[rows])
