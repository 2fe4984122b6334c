import torch
from hypothesis import given
from hypothesis import strategies as st
from oapl_kernels.chunks import default_chunk_tokens, plan_chunks


@given(lengths=st.lists(st.integers(0, 50), max_size=30), chunk_tokens=st.integers(1, 64))
def test_chunks_cover_every_token_once_and_end_at_sequence_ends(lengths, chunk_tokens):
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    chunks = plan_chunks(offsets, chunk_tokens)
    assert [token for c in chunks for token in range(c.start, c.end)] == list(range(offsets[-1]))
    for c in chunks:
        assert c.end - c.start <= chunk_tokens
        if c.piece:
            assert c.last == c.first + 1
            assert offsets[c.first] <= c.start < c.end <= offsets[c.last]
            assert offsets[c.last] - offsets[c.first] > chunk_tokens
        else:
            assert (c.start, c.end) == (offsets[c.first], offsets[c.last])


def test_chunks_are_filled_as_far_as_whole_sequences_allow():
    assert [(c.start, c.end) for c in plan_chunks([0, 3, 6, 9, 20, 21], 7)] == [
        (0, 6),
        (6, 9),
        (9, 14),
        (14, 20),
        (20, 21),
    ]


def test_default_chunks_are_larger_for_a_small_vocabulary():
    cpu = torch.device("cpu")
    assert default_chunk_tokens(151936, cpu) == 384
    assert default_chunk_tokens(32, cpu) * 32 * 4 == 16 << 20
    assert default_chunk_tokens(151936, torch.device("cuda")) == 4096
