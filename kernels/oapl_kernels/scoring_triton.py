"""Log-prob, entropy and normaliser of each token straight from hidden and weight: no logits in memory.

One program per tile of [tokens, vocabulary] stores the tile's max, sum and weighted sum, which are then merged. For
half precision on a GPU where no loss follows; a loss needs the logits again and uses the epilogue.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue_triton import scaled
from .launches import INTERPRETED, launch

TOKENS, VOCABULARY, DEPTH, GROUP = 128, 128, 64, 8
WARPS, STAGES = 8, 2 if torch.version.hip else 3


@triton.jit
def choose_tile(tokens, vocabulary, TOKENS: tl.constexpr, VOCABULARY: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile. GROUP rows of tiles move along the vocabulary together, so that programs
    that run at the same time read the same rows of hidden or weight."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(tokens, TOKENS)
    column_tiles = tl.cdiv(vocabulary, VOCABULARY)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def multiply_tile(
    hidden,
    weight,
    rows,
    columns,
    tokens,
    depth,
    vocabulary,
    hidden_stride,
    weight_stride,
    DEPTH: tl.constexpr,
    DIVIDES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden [rows] @ weight [columns]^T, fp32. In place of rows and columns beyond the end, the first ones are read
    again; what comes of them is not stored."""
    along = tl.arange(0, DEPTH)
    left = hidden + (rows % tokens).to(tl.int64)[:, None] * hidden_stride + along[None, :]
    right = weight + (columns % vocabulary).to(tl.int64)[None, :] * weight_stride + along[:, None]
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for begin in range(0, depth, DEPTH):
        if DIVIDES:
            h, w = tl.load(left), tl.load(right)
        else:
            h = tl.load(left, mask=(begin + along < depth)[None, :], other=0.0)
            w = tl.load(right, mask=(begin + along < depth)[:, None], other=0.0)
        if WIDEN:
            z = tl.dot(h.to(tl.float32), w.to(tl.float32), z, input_precision="ieee")
        else:
            z = tl.dot(h, w, z)
        left += DEPTH
        right += DEPTH
    return z


@triton.jit
def score_tile(
    hidden,
    weight,
    bias,
    target,
    partial,
    chosen,
    tokens,
    depth,
    vocabulary,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    softcap,
    TOKENS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DIVIDES: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """partial [3, vocabulary tiles, tokens] = max, sum, weighted sum of x; chosen [tokens] = x at the target."""
    row_tile, column_tile = choose_tile(tokens, vocabulary, TOKENS, VOCABULARY, GROUP)
    rows = row_tile * TOKENS + tl.arange(0, TOKENS)
    columns = column_tile * VOCABULARY + tl.arange(0, VOCABULARY)
    z = multiply_tile(
        hidden, weight, rows, columns, tokens, depth, vocabulary, hidden_stride, weight_stride, DEPTH, DIVIDES, WIDEN
    )
    if BIAS:
        z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0)[None, :]
    x = tl.where((columns < vocabulary)[None, :], scaled(z, inverse_temperature, softcap, CAP), -float("inf"))
    top = tl.max(x, 1)
    d = tl.where(x > -float("inf"), x - top[:, None], -1e30)
    p = tl.exp(d)
    slot = column_tile.to(tl.int64) * tokens + rows
    plane = tl.cdiv(vocabulary, VOCABULARY).to(tl.int64) * tokens
    tl.store(partial + slot, top, mask=rows < tokens)
    tl.store(partial + plane + slot, tl.sum(p, 1), mask=rows < tokens)
    tl.store(partial + 2 * plane + slot, tl.sum(p * d, 1), mask=rows < tokens)
    hit = columns[None, :] == tl.load(target + rows, mask=rows < tokens, other=-1)[:, None]
    here = tl.sum(hit.to(tl.int32), 1) > 0
    tl.store(chosen + rows, tl.sum(tl.where(hit, x, 0.0), 1), mask=(rows < tokens) & here)


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[4, t] = log-prob (0 where target is -1), entropy, max and ln sum exp(x - max), from hidden [t, D]."""
    tokens, depth = hidden.shape
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    row_tiles, column_tiles = triton.cdiv(tokens, TOKENS), triton.cdiv(len(weight), VOCABULARY)
    partial = torch.empty(3, column_tiles, tokens, dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    launch(
        score_tile,
        (row_tiles * column_tiles,),
        hidden,
        weight,
        hidden if bias is None else bias.float().contiguous(),
        target,
        partial,
        chosen,
        tokens,
        depth,
        len(weight),
        hidden.stride(0),
        weight.stride(0),
        1.0 / temperature,
        softcap or 1.0,
        TOKENS=TOKENS,
        VOCABULARY=VOCABULARY,
        DEPTH=DEPTH,
        GROUP=GROUP,
        DIVIDES=depth % DEPTH == 0,
        BIAS=bias is not None,
        CAP=softcap is not None,
        WIDEN=INTERPRETED,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return _merge(partial[0], partial[1], partial[2], chosen, target)


def _merge(top: Tensor, total: Tensor, weighted: Tensor, chosen: Tensor, target: Tensor) -> Tensor:
    highest = top.amax(0)
    down = (top - highest).clamp_min(-1e30)
    factor = down.exp()
    everything = (total * factor).sum(0)
    log_sum = everything.log()
    entropy = log_sum - (factor * (weighted + down * total)).sum(0) / everything
    logprob = torch.where(target < 0, 0, chosen - highest - log_sum)
    return torch.stack([logprob, entropy, highest, log_sum])
