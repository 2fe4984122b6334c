"""Cast, pack and checksum in Triton: one reading of the source, one writing of the payload."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue_triton import round_to
from .launches import INTERPRETED, launch

BLOCK, WARPS = 2048, 4  # words
SEED_0, SEED_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0x7F4A7C15)


@triton.jit
def mix(h):
    """MurmurHash3's 32-bit finaliser."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def pack_block(source, payload, digest, count, words, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """payload = source, rounded; digest [3] += the block's h_0, h_1 and values that are not finite."""
    A_WORD: tl.constexpr = 32 // payload.dtype.element_ty.primitive_bitwidth  # values a word
    block = tl.program_id(0).to(tl.int64) * BLOCK
    index = block * A_WORD + tl.arange(0, BLOCK * A_WORD)
    valid = index < count
    value = tl.load(source + index, mask=valid, other=0.0).to(tl.float32)
    value = round_to(value, payload.dtype.element_ty, INTERPRETED)
    tl.store(payload + index, value, mask=valid)
    if A_WORD == 1:
        bits = value.to(tl.uint32, bitcast=True)
        nonfinite = (bits & 0x7F800000) == 0x7F800000
    else:
        halves = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        exponent = 0x7F80 if payload.dtype.element_ty == tl.bfloat16 else 0x7C00
        nonfinite = (halves & exponent) == exponent
        low, high = tl.split(tl.reshape(halves, (BLOCK, A_WORD)))
        bits = low | (high << 16)
    word = block + tl.arange(0, BLOCK)
    for k in tl.static_range(2):
        seed = SEED_0 if k == 0 else SEED_1
        hashed = tl.where(word < words, mix(bits ^ mix(word.to(tl.uint32) + seed)), 0)
        # Integer atomics: the sum does not depend on the order of programs.
        tl.atomic_add(digest + k, tl.sum(hashed, 0).to(tl.int32, bitcast=True))
    tl.atomic_add(digest + 2, tl.sum(nonfinite.to(tl.int32), 0))


def pack_words(source: Tensor, payload: Tensor) -> Tensor:
    """`weight_pack.pack` for flat, contiguous tensors."""
    digest = torch.zeros(3, dtype=torch.int32, device=payload.device)
    words = triton.cdiv(payload.numel() * payload.element_size(), 4)
    launch(
        pack_block,
        (triton.cdiv(words, BLOCK),),
        source,
        payload,
        digest,
        len(payload),
        words,
        BLOCK=BLOCK,
        INTERPRETED=INTERPRETED,
        num_warps=WARPS,
    )
    return digest
