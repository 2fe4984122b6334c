from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from oapl_kernels.chunks import Long, Whole, default_chunk_tokens, plan_chunks


def spans(items, offsets):
    """Tokens [start, end) of each chunk."""
    for item in items:
        cuts = [offsets[item.first], offsets[item.last]] if isinstance(item, Whole) else item.cuts
        yield from pairwise(cuts)


@given(lengths=st.lists(st.integers(0, 50), max_size=30), chunk_tokens=st.integers(1, 64))
def test_chunks_cover_every_token_once(lengths, chunk_tokens):
    offsets = [0, *accumulate(lengths)]
    items = plan_chunks(offsets, chunk_tokens)
    chunks = list(spans(items, offsets))
    assert [token for start, end in chunks for token in range(start, end)] == list(range(offsets[-1]))
    assert all(end - start <= chunk_tokens for start, end in chunks)
    for item in items:
        if isinstance(item, Long):
            assert (item.cuts[0], item.cuts[-1]) == tuple(offsets[item.sequence : item.sequence + 2])
            assert item.cuts[-1] - item.cuts[0] > chunk_tokens


def test_chunks_are_filled_as_far_as_sequences_allow():
    offsets = [0, 3, 6, 9, 20, 21]
    items = plan_chunks(offsets, 7)
    assert items == [Whole(0, 2), Whole(2, 3), Long(3, [9, 14, 20]), Whole(4, 5)]
    assert list(spans(items, offsets)) == [(0, 6), (6, 9), (9, 14), (14, 20), (20, 21)]


def test_default_chunks_are_larger_for_a_small_vocabulary():
    cpu = torch.device("cpu")
    assert default_chunk_tokens(151936, cpu) == 384
    assert default_chunk_tokens(32, cpu) * 32 * 4 == 16 << 20
    assert default_chunk_tokens(151936, torch.device("cuda")) == 4096
