"""Implementations of the same loss, forward and backward, for `python -m benchmarks kernels`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from oapl_kernels import PolicyInputs, fused_policy_loss, linear_logprob, matmul
from oapl_kernels.chunks import Whole, default_chunk_tokens, plan_chunks
from oapl_kernels.objectives import Objective, grpo, oapl
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Problem:
    """hidden [T, D], weight [V, D] (leaves), target [T], and the inputs of GRPO."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    behavior: Tensor
    advantage: Tensor
    offsets: Tensor
    chunk: int


def make_problem(shape: str, dtype: torch.dtype, sequences: int) -> Problem:
    tokens, depth, vocabulary = map(int, shape.split("x"))
    torch.manual_seed(0)
    hidden = torch.randn(tokens, depth, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, depth, device=DEVICE) * depth**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    behavior = torch.full((tokens,), -float(torch.tensor(vocabulary).log()), device=DEVICE)
    offsets = torch.arange(0, tokens + 1, tokens // sequences, device=DEVICE)
    advantage = torch.linspace(-1, 1, sequences, device=DEVICE)
    return Problem(hidden, weight, target, behavior, advantage, offsets, default_chunk_tokens(vocabulary, DEVICE))


def fused(backend: str, objective: Objective) -> Callable[[Problem], Tensor]:
    def loss(p: Problem) -> Tensor:
        inputs = PolicyInputs(p.behavior, p.advantage)
        count = float(len(p.advantage))
        return fused_policy_loss(
            p.hidden, p.weight, p.target, p.offsets, objective, inputs, normalizer=count, backend=backend
        ).loss

    return loss


def grpo_loss(p: Problem, logprob: Tensor) -> Tensor:
    inputs = PolicyInputs(p.behavior, p.advantage, cu_seqlens=p.offsets)
    return grpo().fn(logprob, inputs) / len(p.advantage)


def upcast_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


def naive(p: Problem) -> Tensor:
    logs = torch.log_softmax(upcast_logits(p.hidden, p.weight), -1)
    return grpo_loss(p, logs.gather(1, p.target[:, None])[:, 0])


def logprob_by_logsumexp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = upcast_logits(hidden, weight)
    return logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, -1)


def recompute(p: Problem) -> Tensor:
    pieces = zip(p.hidden.split(p.chunk), p.target.split(p.chunk), strict=True)
    parts = [checkpoint(logprob_by_logsumexp, h, p.weight, y, use_reentrant=False) for h, y in pieces]
    return grpo_loss(p, torch.cat(parts))


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    count = len(p.advantage)
    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    target, behavior = p.target.view(count, -1), p.behavior.view(count, -1)
    hidden = p.hidden.view(count, -1, p.hidden.shape[1])
    return function(hidden, p.weight, target, torch.ones_like(target), p.advantage, old_per_token_logps=behavior)[0]


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return grpo_loss(p, -linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none", filter_eps=None))


def scoring(p: Problem) -> None:
    with torch.no_grad():
        linear_logprob(p.hidden, p.weight, p.target)


def contestants() -> dict[str, Callable[[Problem], Tensor]]:
    """Those that run here."""
    chosen = {"ours": fused("auto", grpo()), "ours, OAPL": fused("auto", oapl(1e-3))}
    chosen |= {"ours, torch": fused("torch", grpo()), "naive": naive, "torch recompute": recompute}
    if importlib.util.find_spec("liger_kernel"):
        chosen["Liger GRPO"] = liger
    if importlib.util.find_spec("cut_cross_entropy") and DEVICE.type == "cuda":
        chosen["cut-cross-entropy"] = cut_cross_entropy
    return chosen


def products(p: Problem) -> None:
    """The three matrix products of our own pass, chunk by chunk, and nothing else."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    native = matmul.multiplies_natively(weight.dtype, DEVICE.type)
    logits = torch.zeros(p.chunk, len(weight), device=DEVICE, dtype=matmul.accumulation_dtype(weight.dtype))
    grad = logits.to(weight.dtype) if native else logits
    out = torch.empty_like(hidden)
    total = matmul.WeightGradient(torch.empty(weight.shape, device=DEVICE), None)
    offsets = p.offsets.tolist()
    for item in plan_chunks(offsets, p.chunk):
        cuts = [offsets[item.first], offsets[item.last]] if isinstance(item, Whole) else item.cuts
        for start, end in pairwise(cuts):
            rows, size = slice(start, end), end - start
            matmul.project(hidden[rows], weight, logits[:size])
            matmul.hidden_product(grad[:size], weight, out[rows])
            total.add(grad[:size], hidden[rows])
