"""Attention over packed rows, registered with transformers as `oapl_packed`.

A plan, made once per batch from its spans, says who reads whom: a prefix reads itself, a response reads its group's
prefix and itself, all causally. Two forms of the same mathematics: SDPA on pieces (any device and dtype); on CUDA in
half precision one variable-length flash call, with the prefix's keys and values gathered before each response.

Stock attention given packed rows is silently wrong (a jump of positions is read as a new document), so nothing runs
unless both are there: `packed_attention` refuses without a plan, `Policy.hidden` without the registered attention.
The plan is a context variable, because the layers of some models do not pass keyword arguments on to attention.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from oapl_engine.errors import ConfigError
from oapl_engine.samples import PromptSpan

NAME = "oapl_packed"
# Up to this many rows one masked call per group beats one call per response (measured on CPU: packing.md).
ROWS_IN_ONE_CALL = 256


class AttentionOptions(NamedTuple):
    """How queries meet keys: softcap(scale * q·k) over the last `window` positions.

    scale:    None: 1/√D
    window:   positions, the query's own included; None: all of them
    softcap:  c of c·tanh(x / c); None: no cap
    sinks:    [H], a score of each head that takes its share of the softmax and adds nothing; None: no sink
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class SdpaCall:
    """Query rows of one SDPA call; `context`: index of the piece with the shared prefix, read before the own rows."""

    rows: int
    context: int | None
    span: PromptSpan | None = None  # a complete small group in one call


@dataclass(frozen=True)
class AttentionPlan:
    """Immutable but for `masks`, a memo that all layers share. Index tensors are for the variable-length form:

    gather [K] i64 (None: keys are the rows themselves), cu_query and cu_key [S+1] i32, S segments in order of rows.
    """

    pieces: tuple[SdpaCall, ...]
    device: torch.device
    kernel: str  # "sdpa" | "flash" | "varlen"
    gather: Tensor | None
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)


_PLAN: ContextVar[AttentionPlan | None] = ContextVar("attention_plan", default=None)


@contextmanager
def use_plan(plan: AttentionPlan | None) -> Iterator[None]:
    """Inside, packed attention follows this plan."""
    before = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(before)


def keep_plan() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: recomputation, which comes later, follows the plan of the first pass."""
    return nullcontext(), use_plan(_PLAN.get())


def plan_attention(spans: Sequence[PromptSpan], device: torch.device, kernel: str = "sdpa") -> AttentionPlan:
    """The plan of a batch with these spans."""
    segments = [s for span in spans for s in _segments(span)]
    queries = torch.tensor([rows for _, rows, _ in segments])
    keys = torch.tensor([rows + prefix[1] for _, rows, prefix in segments])
    shared = any(prefix[1] for _, _, prefix in segments)
    ranges = [(a, n) for start, rows, prefix in segments for a, n in (prefix, (start, rows)) if n]
    return AttentionPlan(
        pieces=tuple(_pieces(spans)),
        device=device,
        kernel=kernel,
        gather=torch.cat([torch.arange(a, a + n) for a, n in ranges]).to(device) if shared else None,
        cu_query=F.pad(queries.cumsum(0), (1, 0)).to(device, torch.int32),
        cu_key=F.pad(keys.cumsum(0), (1, 0)).to(device, torch.int32),
        max_query=int(queries.max()),
        max_key=int(keys.max()),
    )


Segment = tuple[int, int, tuple[int, int]]  # first row, rows, (start, length) of the prefix that it reads


def _segments(span: PromptSpan) -> list[Segment]:
    prefix = (span.start, span.length)
    own: list[Segment] = [(span.start, span.length, (0, 0))] if span.length else []
    return own + [(start, rows, prefix) for start, rows in span.responses]


def _pieces(spans: Sequence[PromptSpan]) -> list[SdpaCall]:
    pieces: list[SdpaCall] = []
    for span in spans:
        total = span.length + sum(rows for _, rows in span.responses)
        if len(span.responses) > 1 and total <= ROWS_IN_ONE_CALL:
            pieces.append(SdpaCall(total, None, span))
            continue
        context = len(pieces) if span.length else None
        if span.length:
            pieces.append(SdpaCall(span.length, None))
        pieces.extend(SdpaCall(rows, context) for _, rows in span.responses)
    return pieces


def attention_kernel(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Kernel for `model.attention` on this device: "flash", torch's "varlen", or "sdpa". Raises ConfigError."""
    half_on_cuda = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = importlib.util.find_spec("flash_attn") is not None
    if requested == "flash" and not (half_on_cuda and installed):
        lack = "flash-attn is not installed" if half_on_cuda else f"flash-attn cannot run on {device.type} in {dtype}"
        raise ConfigError(f'model.attention = "flash": {lack}; use model.attention = "auto"')
    if requested == "sdpa" or not half_on_cuda:
        return "sdpa"
    return "flash" if installed else "varlen"


@torch.compiler.disable  # a plan's lengths differ in every batch: traced, each would be compiled anew
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D], contiguous. RuntimeError without a plan."""
    plan = _PLAN.get()
    if plan is None:
        raise RuntimeError(f'attention "{NAME}" ran without a plan: call the model through Policy.hidden')
    if attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} has an attention mask of its own: its rows cannot be packed")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE returns float32
    how = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    lacks = s_aux is not None or (softcap is not None and plan.kernel != "flash")
    if plan.kernel == "sdpa" or lacks:
        return segment_attention(query, key, value, plan, how), None
    kernel = _flash if plan.kernel == "flash" else _varlen
    return varlen_attention(query[0], key[0], value[0], plan, kernel, how)[None], None


AttentionInterface.register(NAME, packed_attention)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, how: AttentionOptions) -> Tensor:
    """One SDPA call per piece. Shapes as in `packed_attention`."""
    sizes = [piece.rows for piece in plan.pieces]
    # split, not slices: the backward of each slice would zero-fill a tensor of all rows.
    queries, keys, values = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
    out = []
    for i, piece in enumerate(plan.pieces):
        k, v = keys[i], values[i]
        if piece.context is not None:
            k, v = torch.cat([keys[piece.context], k], 2), torch.cat([values[piece.context], v], 2)
        if (i, how.window) not in plan.masks:
            plan.masks[i, how.window] = _mask(plan, piece, how.window)
        out.append(_attend(queries[i], k, v, plan.masks[i, how.window], how))
    return torch.cat([piece.transpose(1, 2) for piece in out], 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: AttentionOptions) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if how.softcap is None and how.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=how.scale, enable_gqa=repeats > 1
        )
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    rows, columns = scores.shape[-2:]
    keep = mask if mask is not None else torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~keep, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., :columns].to(value.dtype) @ value


def _mask(plan: AttentionPlan, piece: SdpaCall, window: int | None) -> Tensor | None:
    """Boolean mask [rows, keys] of a piece; None: plainly causal."""
    if piece.span is not None:
        position, owner = _positions_and_owners(piece.span, plan.device)
        mine = (owner[None] == owner[:, None]) | (owner[None] == 0)
        return mine & _causal(position, position, window)
    context = 0 if piece.context is None else plan.pieces[piece.context].rows
    if not context and (window is None or window >= piece.rows):
        return None
    keys = torch.arange(context + piece.rows, device=plan.device)
    return _causal(keys[context:], keys, window)


def _positions_and_owners(span: PromptSpan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of a group: position in its sequence, and 0 for the prefix or the response's number from 1."""
    lengths = torch.tensor([span.length, *(rows for _, rows in span.responses)], device=device)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    rank = torch.arange(len(owner), device=device) - starts[owner]
    return torch.where(owner == 0, rank, rank + span.length), owner


def _causal(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    distance = query[:, None] - key[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, kernel: Callable[..., Tensor], how: AttentionOptions
) -> Tensor:
    """query [H, T, D], key and value [Hkv, T, D] -> [T, H, D] by one call of `kernel`, causal and aligned bottom right.

    Plain autograd: the gather's backward adds the gradients of a prefix's copies.
    """
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    if plan.gather is not None:
        key, value = key.index_select(0, plan.gather), value.index_select(0, plan.gather)
    lengths = (plan.cu_query, plan.cu_key, plan.max_query, plan.max_key)
    options = (how.scale, how.window, how.softcap)
    return kernel(query.contiguous(), key.contiguous(), value.contiguous(), *lengths, *options)


def _flash(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap) -> Tensor:  # type: ignore[no-untyped-def]
    from flash_attn import flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": sides, "softcap": softcap or 0.0}
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap) -> Tensor:  # type: ignore[no-untyped-def]
    from torch.nn.attention.varlen import varlen_attn

    sides = (-1, 0) if window is None else (window - 1, 0)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=sides, enable_gqa=grouped)
