"""A publish is complete and proven, or the engine serves nothing and the parameter at fault is named."""

import numpy as np
import pytest
import torch

from oapl_engine.weights.attest import ProbePrompts, WeightMismatchError
from oapl_engine.weights.bucket_layout import lay_out
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.receiver.update import InPlaceUpdate
from tests.support.engines import ReceiverEngine, assert_identical, bigram_logprobs


@pytest.fixture
def pair(fused_model, tensors):
    """(engine, publisher, trainer): the trainer's tensors by name, changed by tests at will."""
    trainer = tensors()
    engine = ReceiverEngine(fused_model())
    equal = fused_model()

    def truth(prompts):
        equal.load_weights(trainer.items())
        return [bigram_logprobs(equal, p) for p in prompts]

    probes = ProbePrompts([[1, 2, 3, 4], [5, 6, 7]], truth, 1e-3)
    publisher = Publisher(trainer.items, engine, bucket_bytes=512, dtype=torch.float32, probes=probes)
    yield engine, publisher, trainer
    publisher.close()


def change(trainer):
    for tensor in trainer.values():
        tensor += torch.randn_like(tensor)


def test_each_publish_equals_a_freshly_loaded_model(pair, fused_model):
    """After each of three publishes the engine equals a freshly loaded model."""
    engine, publisher, trainer = pair
    for version in (1, 2, 3):
        change(trainer)
        report = publish_paused(publisher, version)
        assert_identical(engine.receiver.model, trainer, fused_model)
        assert engine.serving
        assert report.bytes == sum(t.nbytes for t in trainer.values())
    assert engine.phases.count("init") == 1
    assert engine.phases.count("bucket") == 3 * 4, "320 + 256 | 256 + 256 | … of 512 bytes: both buffers are used twice"


def test_the_checksum_of_a_version_depends_on_its_bytes_only(pair):
    _, publisher, trainer = pair
    first = publish_paused(publisher, 1)
    again = publish_paused(publisher, 2)
    assert first.checksum == again.checksum
    assert again.changed_share == 0
    trainer["norm"][0] += 1
    third = publish_paused(publisher, 3)
    assert third.checksum != first.checksum
    assert third.changed_share == pytest.approx(1 / (16 * 8 + 24 * 8 + 8 * 8 + 8))


def test_float32_weights_are_rounded_to_the_nearest_even_bfloat16(fused_model, tensors):
    trainer = tensors()
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0, 0, 0, 0], dtype=torch.int32)
    trainer["norm"] = bits.view(torch.float32)
    engine = ReceiverEngine(fused_model(torch.bfloat16))
    publisher = Publisher(trainer.items, engine, dtype=torch.bfloat16)
    publish_paused(publisher, 1)
    found = engine.receiver.model.norm.data.view(torch.int16)[:4].tolist()
    assert found == [0x3F80, 0x3F82, 0x3F81, 0x3F80]
    publisher.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(pair, value):
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    trainer["k"][2, 3] = value
    with pytest.raises(WeightMismatchError) as refusal:
        publish_paused(publisher, 2)
    assert refusal.value.parameter == "k"
    assert not engine.serving


def test_nothing_of_a_bucket_with_a_flipped_bit_is_written(pair, fused_model):
    """A flipped bit is refused by name and nothing of its bucket reaches the model."""
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    before = engine.receiver.model.qkv.clone()

    def flip(request):
        if "k" in request.checksums:
            piece = next(p for p in publisher.layout.slices if p.name == "k")
            publisher.buckets.views[piece.bucket % 2][piece.offset + 5] ^= 1

    engine.before["bucket"] = flip
    change(trainer)
    with pytest.raises(WeightMismatchError, match=r"^k: expected checksum"):
        publish_paused(publisher, 2)
    assert torch.equal(engine.receiver.model.qkv[:16], before[:16]), "q travels with k"
    assert not engine.serving
    engine.before.clear()
    publish_paused(publisher, 3)
    assert_identical(engine.receiver.model, trainer, fused_model)


def test_a_tensor_left_out_by_the_trainer_is_refused_by_name(pair):
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    del trainer["v"]
    with pytest.raises(WeightMismatchError) as refusal:
        publish_paused(publisher, 2)
    assert refusal.value.parameter == "v"
    assert not engine.serving


def test_a_tensor_that_got_lost_on_the_way_is_refused_by_name(pair):
    engine, publisher, _ = pair
    engine.before["bucket"] = lambda request: request.checksums.pop("down", None)
    with pytest.raises(WeightMismatchError, match=r"^down: expected to arrive"):
        publish_paused(publisher, 1)
    assert not engine.serving


def test_a_reshaped_or_additional_tensor_is_refused_by_name(pair):
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    trainer["norm"] = torch.zeros(4, 2)
    with pytest.raises(WeightMismatchError, match=r"^norm: expected shape \[8\]"):
        publish_paused(publisher, 2)
    trainer["norm"] = torch.zeros(8)
    publish_paused(publisher, 3)
    trainer["extra"] = torch.zeros(3)
    with pytest.raises(WeightMismatchError, match=r"^extra: expected no tensor"):
        publish_paused(publisher, 4)
    with pytest.raises(WeightMismatchError, match=r"^extra: expected to be used by load_weights"):
        publish_paused(publisher, 5)
    assert not engine.serving


def test_live_bytes_that_differ_are_refused_by_name(pair):
    """Live bytes that differ from what was sent are refused by name."""
    engine, publisher, _ = pair
    report = engine.receiver.report

    def corrupted():
        found = report()
        found["checksums"] = {n: v ^ (n == "embed") for n, v in found["checksums"].items()}
        return found

    engine.receiver.report = corrupted
    with pytest.raises(WeightMismatchError, match=r"^embed: expected checksum"):
        publish_paused(publisher, 1)
    assert not engine.serving


def test_old_logprobs_after_a_move_are_refused_as_stale(pair):
    """Old log-probs where the trainers moved are refused as stale."""
    engine, publisher, trainer = pair
    engine.answers = np.full(3, -2.0, np.float32)
    moving = [np.full(3, -2.0, np.float32)]
    publisher.probes = ProbePrompts([[1, 2, 3, 4]], lambda prompts: [moving[0]], 1e-3)
    publish_paused(publisher, 1)
    moving[0] = moving[0] + 5e-5
    publish_paused(publisher, 2)
    moving[0] = moving[0] + 2e-4
    publish_paused(publisher, 3)  # not a bit of the engine's changed: its log-probs may stay
    moving[0] = moving[0] + 2e-4
    change(trainer)
    with pytest.raises(WeightMismatchError, match="probe prompts: expected new log-probs"):
        publish_paused(publisher, 4)
    assert not engine.serving


def test_log_probs_far_from_the_trainers_are_refused(pair):
    engine, publisher, _ = pair
    engine.answers = np.full(3, -2.0, np.float32)
    publisher.probes = ProbePrompts([[1, 2, 3, 4]], lambda prompts: [np.full(3, -2.1, np.float32)], 1e-3)
    with pytest.raises(WeightMismatchError, match=r"probe prompt 0: .*mean difference of 0\.1"):
        publish_paused(publisher, 1)
    engine.answers = np.full(3, np.nan, np.float32)
    with pytest.raises(WeightMismatchError, match="probe prompt 0"):
        publish_paused(publisher, 2)
    assert not engine.serving


def test_a_restarted_engine_gets_its_plan_and_buckets_again(pair, fused_model):
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    engine.receiver = InPlaceUpdate(fused_model())
    publisher.engine_restarted()
    publish_paused(publisher, 2)
    assert_identical(engine.receiver.model, trainer, fused_model)


def test_tied_tensors_travel_once(pair):
    _, publisher, trainer = pair
    trainer["head"] = trainer["embed"]
    report = publish_paused(publisher, 1)
    assert report.bytes == sum(t.nbytes for n, t in trainer.items() if n != "head")


def test_a_layout_fits_its_buckets_and_splits_between_rows():
    """A layout never overlaps stays within its bucket and splits between rows."""
    shapes = [(1,), (100,), (128,), (3,), (10, 100), (5,), (2, 700), ()]
    tensors = [(str(i), torch.empty(shape)) for i, shape in enumerate(shapes)]
    layout = lay_out(tensors, torch.bfloat16, 512)
    assert layout.size <= 512
    ends, covered = {}, {}
    for piece in layout.slices:
        assert piece.offset % 64 == 0
        assert piece.offset >= ends.get(piece.bucket, 0)
        ends[piece.bucket] = piece.offset + 2 * piece.length
        assert ends[piece.bucket] <= layout.size
        assert piece.start == covered.get(piece.name, 0), "in order, without gaps"
        covered[piece.name] = piece.start + piece.length
    assert covered == {name: t.numel() for name, t in tensors}
    assert [p.length for p in layout.slices if p.name == "4"] == [200] * 5, "two rows of 100 fit"
    assert [p.length for p in layout.slices if p.name == "6"] == [256] * 5 + [120], "not one row of 700 fits"


def test_a_dead_engine_is_reported_before_a_missing_tensor(pair):
    """A dead engine is the cause that is reported even where a tensor is missing too."""
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    del trainer["v"]

    def dead(request):
        raise ConnectionError("gone")

    engine.before["start"] = dead
    with pytest.raises(ConnectionError, match="gone"):
        publish_paused(publisher, 2)
