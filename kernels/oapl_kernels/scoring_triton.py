"""Log-prob, entropy and normaliser of each token straight from hidden and weight: no logits in memory.

One program a tile of [tokens, vocabulary]; it leaves the tile's max, sum and weighted sum, which are then merged.
For half precision on a GPU, where scoring is all that is asked; a loss needs the logits again and takes the epilogue.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue_triton import scaled
from .launches import INTERPRETED, launch
from .workspace import workspace

TOKENS, VOCABULARY, DEPTH, GROUP = 128, 128, 64, 8
WARPS, STAGES = 8, 2 if torch.version.hip else 3


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
    WHOLE_DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """partial [3, vocabulary tiles, tokens] = max, sum, weighted sum of x; chosen [tokens] = x at the target."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(tokens, TOKENS)
    column_tiles = tl.cdiv(vocabulary, VOCABULARY)
    # Neighbours share rows of weight or hidden: GROUP token tiles walk the vocabulary together.
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    row_tile, column_tile = first + inside % height, inside // height
    rows = row_tile * TOKENS + tl.arange(0, TOKENS)
    columns = column_tile * VOCABULARY + tl.arange(0, VOCABULARY)
    along = tl.arange(0, DEPTH)
    # Rows and columns beyond the end are read again from the start and dropped below.
    left = hidden + (rows % tokens).to(tl.int64)[:, None] * hidden_stride + along[None, :]
    right = weight + (columns % vocabulary).to(tl.int64)[None, :] * weight_stride + along[:, None]
    z = tl.zeros((TOKENS, VOCABULARY), tl.float32)
    for begin in range(0, depth, DEPTH):
        if WHOLE_DEPTH:
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
    if BIAS:
        z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0)[None, :]
    valid = (columns < vocabulary)[None, :]
    x = tl.where(valid, scaled(z, inverse_temperature, softcap, CAP), -float("inf"))
    top = tl.max(x, 1)
    d = tl.where(x > -float("inf"), x - top[:, None], -1e30)
    p = tl.exp(d)
    slot = column_tile.to(tl.int64) * tokens + rows
    plane = column_tiles.to(tl.int64) * tokens
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
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    row_tiles, column_tiles = triton.cdiv(tokens, TOKENS), triton.cdiv(len(weight), VOCABULARY)
    partial = workspace(3, column_tiles, tokens, dtype=torch.float32, device=hidden.device)
    chosen = workspace(tokens, dtype=torch.float32, device=hidden.device)
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
        WHOLE_DEPTH=depth % DEPTH == 0,
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
