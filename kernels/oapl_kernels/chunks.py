"""How the tokens of a packed batch are cut into chunks for the head."""

from typing import NamedTuple

import torch


class Whole(NamedTuple):
    """Complete sequences [first, last) that together fill at most one chunk."""

    first: int
    last: int


class Long(NamedTuple):
    """One sequence that is longer than a chunk: each piece is [cuts[i], cuts[i + 1]), in tokens of the batch."""

    sequence: int
    cuts: list[int]


SMALL_LOGITS = 1 << 22  # 16 MB of fp32: a chunk is not made smaller than that


def default_chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk: 384 on CPU, enough for efficient products and small compared with the weight's fp32 gradient;
    4096 on a GPU, where below about 1200 (H100) the traffic of that gradient takes longer than its product; more where
    the vocabulary is small."""
    return max(384 if device.type == "cpu" else 4096, SMALL_LOGITS // vocabulary)


def plan_chunks(offsets: list[int], chunk_tokens: int) -> list[Whole | Long]:
    """Complete sequences packed greedily into at most chunk_tokens; a longer sequence is cut into equal pieces."""
    items: list[Whole | Long] = []
    first, count = 0, len(offsets) - 1
    while first < count:
        start, last = offsets[first], first + 1
        length = offsets[last] - start
        if length > chunk_tokens:
            pieces = -(-length // chunk_tokens)
            items.append(Long(first, [start + length * index // pieces for index in range(pieces + 1)]))
        else:
            while last < count and offsets[last + 1] - start <= chunk_tokens:
                last += 1
            items.append(Whole(first, last))
        first = last
    return items
