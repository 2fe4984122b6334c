"""How the tokens of a packed batch are cut into chunks for the head."""

from itertools import pairwise
from typing import NamedTuple

import torch


class Chunk(NamedTuple):
    """Tokens [start, end) of the sequences [first, last): all of them, or a piece of the one sequence `first`."""

    start: int
    end: int
    first: int
    last: int
    piece: bool


SMALL_LOGITS = 1 << 22  # 16 MB of fp32: a chunk is not made smaller than that


def default_chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens a chunk: 384 on CPU, enough for efficient products and small beside the weight's fp32 gradient; 4096 on a
    GPU, where under about 1200 (H100) the traffic of that gradient no longer hides behind its product; more where the
    vocabulary is small."""
    return max(384 if device.type == "cpu" else 4096, SMALL_LOGITS // vocabulary)


def plan_chunks(offsets: list[int], chunk_tokens: int) -> list[Chunk]:
    """Whole sequences packed greedily into at most chunk_tokens; a longer sequence is cut into equal pieces."""
    chunks: list[Chunk] = []
    first, count = 0, len(offsets) - 1
    while first < count:
        start, last = offsets[first], first + 1
        length = offsets[last] - start
        if length > chunk_tokens:
            pieces = -(-length // chunk_tokens)
            cuts = [start + length * index // pieces for index in range(pieces + 1)]
            chunks += [Chunk(a, b, first, last, True) for a, b in pairwise(cuts)]
        else:
            while last < count and offsets[last + 1] - start <= chunk_tokens:
                last += 1
            chunks.append(Chunk(start, offsets[last], first, last, False))
        first = last
    return chunks
