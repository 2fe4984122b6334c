"""The receiver's checksum is of a tensor's bytes in row-major order, and a flipped bit or a moved word changes it."""

import torch
from oapl_kernels.weight_pack import pack

from oapl_engine.weights.receiver.checksum import checksums as receiver_checksums


def checksum(tensor):
    (found,) = receiver_checksums([tensor])
    return found


def test_it_is_what_packing_says():
    source, payload = torch.randn(1001), torch.empty(1001, dtype=torch.bfloat16)
    low, high, _ = (pack(source, payload).long() & 0xFFFFFFFF).tolist()
    assert checksum(payload) == low | high << 32


def test_it_is_of_the_bytes_in_row_major_order_whatever_the_dtype():
    tensor = torch.randn(6, 10).to(torch.bfloat16)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous().view(torch.int16))
    assert checksum(tensor.t()) != checksum(tensor)


def test_every_single_flipped_bit_changes_it():
    words = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    whole = checksum(words)
    for bit in range(64 * 32):
        flipped = words.clone().view(torch.uint8)
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum(flipped) != whole


def test_two_words_that_trade_places_change_it():
    words = torch.arange(1, 1001, dtype=torch.int32)
    swapped = words.clone()
    swapped[[3, 700]] = words[[700, 3]]
    assert checksum(swapped) != checksum(words)
