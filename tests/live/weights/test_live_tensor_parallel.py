"""An engine split over two processes takes publishes as one does: each rank its shard, proven by the same checksums."""

import os

import pytest

from oapl_engine.weights.attest import WeightMismatchError

pytestmark = [pytest.mark.live, pytest.mark.slow]


def test_two_ranks_are_token_exact_after_publishes(make_rig):
    """Two ranks are token exact after publishes and leave nothing behind."""
    before = set(os.listdir("/dev/shm"))
    rig = make_rig(tensor_parallel=2)
    for _ in range(3):
        rig.change()
        report = rig.publish()
        assert rig.greedy_of_engine() == rig.greedy_of_trainer()
        assert report.gap.max <= 5e-4
    rig.fault.write_text("lost scatter")
    rig.change()
    with pytest.raises(WeightMismatchError):
        rig.publish()
    rig.engine.stop()
    assert set(os.listdir("/dev/shm")) <= before
