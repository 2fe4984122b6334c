"""The 64-bit checksum of a tensor's bytes that both sides of a transfer compute (formula in docs and in reference()).

Words w_i are little-endian u32, zero-padded: h_k = sum_i fmix32(w_i ^ fmix32(i + SEEDS[k])) mod 2^32 for k = 0, 1. It
depends on the order of words, and any split of them can be summed in parallel.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

SEEDS = (0x9E3779B9, 0x7F4A7C15)  # k = 0, 1
CHUNK = 1 << 15  # words; three arrays of them stay in a core's L2 cache
CACHED_CHUNKS = 64  # index hashes of the first chunks are kept (16 MiB): most tensors are no longer than that

Words = NDArray[np.uint32]


def checksum(tensor: torch.Tensor) -> int:
    """h_0 | h_1 << 32 of the bytes of a tensor, in row-major order. Any dtype; computed on the CPU by a few threads."""
    words = as_words(tensor)
    chunks = range(-(-len(words) // CHUNK))
    add = functools.partial(_chunk, words)
    parts = list(map(add, chunks) if len(chunks) < 4 else _pool().map(add, chunks))
    return combine(parts)


def combine(parts: list[tuple[int, int]]) -> int:
    """The checksum from (h_0, h_1) of disjoint parts."""
    low, high = (sum(column) & 0xFFFFFFFF for column in zip(*parts, strict=True)) if parts else (0, 0)
    return low | high << 32


def as_words(tensor: torch.Tensor) -> Words:
    """The bytes of a tensor as u32, zero-padded; no copy where it is contiguous and a multiple of 4 bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4:
        flat = torch.nn.functional.pad(flat, (0, 4 - flat.numel() % 4))
    return flat.numpy().view("<u4")


def _chunk(words: Words, number: int) -> tuple[int, int]:
    part = words[number * CHUNK : (number + 1) * CHUNK]
    hashed, scratch = np.empty(len(part), np.uint32), np.empty(len(part), np.uint32)
    sums = []
    for k in (0, 1):
        index = _kept_index(number, k) if number < CACHED_CHUNKS else _index(number, k)
        np.bitwise_xor(part, index[: len(part)], out=hashed)
        _mix(hashed, scratch)
        sums.append(int(hashed.sum(dtype=np.uint64)))
    return sums[0], sums[1]


def _index(number: int, k: int) -> Words:
    index = np.arange(number * CHUNK + SEEDS[k], (number + 1) * CHUNK + SEEDS[k], dtype=np.uint64).astype(np.uint32)
    _mix(index, np.empty_like(index))
    return index


_kept_index = functools.lru_cache(2 * CACHED_CHUNKS)(_index)


def _mix(h: Words, scratch: Words) -> None:
    """murmur3's fmix32, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(h, shift, out=scratch)
        np.bitwise_xor(h, scratch, out=h)
        if factor != 1:
            np.multiply(h, np.uint32(factor), out=h)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="checksum")
