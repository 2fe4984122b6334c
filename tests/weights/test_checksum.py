"""The checksum is the formula of the contract, and a flipped bit or a moved word changes it."""

import numpy as np
import pytest
import torch

from oapl_engine.weights.receiver import checksum as c


def reference(data: bytes) -> int:
    """Straight from the formula, in Python integers mod 2^32."""

    def fmix32(h: int) -> int:
        h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ h >> 16

    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").tolist()
    sums = [sum(fmix32(w ^ fmix32((i + seed) & 0xFFFFFFFF)) for i, w in enumerate(words)) for seed in c.SEEDS]
    return sums[0] & 0xFFFFFFFF | (sums[1] & 0xFFFFFFFF) << 32


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 4096, 4 * c.CHUNK - 4, 4 * c.CHUNK, 4 * c.CHUNK + 1, 20 * c.CHUNK + 7])
def test_checksum_equals_the_formula_at_every_length(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert c.checksum(torch.from_numpy(data.copy())) == reference(data.tobytes())


def test_checksum_past_the_kept_index_hashes_equals_the_formula(monkeypatch):
    monkeypatch.setattr(c, "CACHED_CHUNKS", 2)
    data = np.random.default_rng(1).integers(0, 256, 4 * c.CHUNK * 4, np.uint8)
    assert c.checksum(torch.from_numpy(data.copy())) == reference(data.tobytes())


def test_checksum_is_of_the_bytes_in_row_major_order_whatever_the_dtype():
    tensor = torch.randn(6, 10).to(torch.bfloat16)
    assert c.checksum(tensor.t()) == c.checksum(tensor.t().contiguous().view(torch.int16))
    assert c.checksum(tensor.t()) != c.checksum(tensor)


def test_every_single_flipped_bit_changes_the_checksum():
    words = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    whole = c.checksum(words)
    for bit in range(64 * 32):
        flipped = words.clone().view(torch.uint8)
        flipped[bit // 8] ^= 1 << bit % 8
        assert c.checksum(flipped) != whole


def test_two_words_that_trade_places_change_the_checksum():
    words = torch.arange(1, 1001, dtype=torch.int32)
    swapped = words.clone()
    swapped[[3, 700]] = words[[700, 3]]
    assert c.checksum(swapped) != c.checksum(words)


def test_the_parts_of_a_checksum_sum_to_the_whole():
    words = c.as_words(torch.randn(5 * c.CHUNK))
    parts = [c._chunk(words, number) for number in range(5)]
    assert c.combine(parts[::-1]) == c.checksum(torch.from_numpy(words.view(np.float32)))
