"""A tensor larger than a bucket travels in pieces: every element of it arrives, once, whatever view the model took."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.receiver.plan import PlanError, StridedView, restrict
from tests.support.engines import ReceiverEngine, assert_identical


def region(name, tensor):
    return StridedView(name, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.t(),
    "columns": lambda t: t[:, 2:5],
    "rows": lambda t: t[1:4],
    "one row": lambda t: t[3],
    "heads": lambda t: t.view(-1, 2, t.shape[1])[:, 1],
    "expanded": lambda t: t[:1].expand(3, t.shape[1]),
}


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(2, 8).map(lambda n: 2 * n),
    columns=st.integers(5, 9),
    view=st.sampled_from(sorted(VIEWS)),
    data=st.data(),
)
def test_pieces_of_a_copy_add_up_to_the_copy(rows, columns, view, data):
    source = torch.arange(rows * columns).view(rows, columns)
    taken = VIEWS[view](source)
    live = torch.full((taken.numel() + 7,), -1)
    place = live[7:].view(taken.shape)
    cuts = sorted({0, source.numel(), *data.draw(st.lists(st.integers(1, source.numel() - 1), max_size=4))})
    counts = torch.zeros_like(live)
    for start, stop in itertools.pairwise(cuts):
        for to, at in restrict(region("live", place), region("source", taken), start, stop):
            piece = at.view(source)
            assert (start <= piece).all()
            assert (piece < stop).all()
            to.view(live).copy_(piece)
            to.view(counts).add_(1)
    assert torch.equal(place, taken)
    assert (counts[7:] == 1).all()
    assert (counts[:7] == 0).all()


def test_a_view_whose_rows_interleave_is_refused_by_name():
    tensor = torch.arange(24)
    woven = torch.as_strided(tensor, (4, 5), (3, 2))
    with pytest.raises(PlanError, match="source: expected rows that do not interleave"):
        list(restrict(region("live", woven), region("source", woven), 0, 8))


@pytest.mark.parametrize("bucket_bytes", [64, 100, 192, 1 << 20])
def test_both_buckets_stay_small_and_the_model_is_whole(fused_model, tensors, bucket_bytes):
    """embed [10, 8] and q, k, v, down [8, 8] of float32 are 320 and 256 bytes: none fits a bucket of 64."""
    trainer, engine = tensors(), ReceiverEngine(fused_model())
    publisher = Publisher(trainer.items, engine, bucket_bytes=bucket_bytes, dtype=torch.float32)
    report = publish_paused(publisher, 1)
    assert publisher.buckets.size <= bucket_bytes
    assert_identical(engine.receiver.model, trainer, fused_model)
    trainer["down"][7, 7] += 1
    assert publish_paused(publisher, 2).changed_share == pytest.approx(1 / (16 * 8 + 24 * 8 + 8 * 8 + 8))
    assert_identical(engine.receiver.model, trainer, fused_model)
    assert report.bytes == sum(t.nbytes for t in trainer.values())
    publisher.close()
