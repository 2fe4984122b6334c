"""A fault campaign against a live engine: every fault is refused before the engine serves, with its parameter named."""

import msgspec
import numpy as np
import pytest
import torch

from oapl_engine.inference.client import EngineRefusedError
from oapl_engine.weights.attest import WeightMismatchError
from tests.support.rig import Rig

pytestmark = pytest.mark.live

KINDS = ["dropped", "lost", "duplicated", "renamed", "reshaped", "flipped", "stale head", "prefix cache kept"]


class Campaign:
    """Publishes with one fault each; every one must be refused by name, and the next whole version must serve."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.rng = rig, np.random.default_rng(seed)
        self.names = [name for name, _ in rig.model.named_parameters()]

    def run(self, count: int) -> int:
        return sum(self.caught(KINDS[i % len(KINDS)]) for i in range(count))

    def caught(self, kind: str) -> bool:
        rig = self.rig
        name = str(self.rng.choice(self.names))
        if kind in ("dropped", "renamed", "reshaped", "duplicated") and self.rng.random() < 0.5:
            rig.publisher.engine_restarted()  # the fault is there when the plan is made
        served = rig.counters()
        rig.change()
        try:
            expected = getattr(self, kind.replace(" ", "_"))(name)
            with pytest.raises(WeightMismatchError) as refusal:
                rig.publish()
            assert expected in str(refusal.value), (kind, name, str(refusal.value))
            self.nothing_new_serves(served)
        finally:
            self.mend()
        rig.publish()
        assert rig.greedy_of_engine() == rig.greedy_of_trainer()
        return True

    def nothing_new_serves(self, served):
        """Either not a byte was written and the old version is whole, or the engine refuses to serve."""
        now = self.rig.counters()
        if now["state"] == "complete":
            assert now["version"] == served["version"]
        else:
            with pytest.raises(EngineRefusedError, match="weights are incomplete"):
                self.rig.control.resume()
        assert not self.rig.served_within(0.05)

    def mend(self):
        rig = self.rig
        rig.control.let_go()
        rig.publisher.named_tensors = rig.model.named_parameters
        rig.fault.write_text("live head")
        rig.publisher.engine_restarted()
        rig.publish()
        rig.fault.unlink()

    def offer(self, change):
        """Let the trainer offer change(name, tensor) → pairs instead of each pair."""
        model = self.rig.model
        self.rig.publisher.named_tensors = lambda: (p for n, t in model.named_parameters() for p in change(n, t))

    def dropped(self, name):
        self.offer(lambda n, t: [] if n == name else [(n, t)])
        return self.fused(name)

    def renamed(self, name):
        self.offer(lambda n, t: [(f"{n}.old" if n == name else n, t)])
        return self.fused(name)

    def duplicated(self, name):
        self.offer(lambda n, t: [(n, t), (n, t.clone())] if n == name else [(n, t)])
        return self.fused(name)

    def reshaped(self, name):
        self.offer(lambda n, t: [(n, t.reshape(-1, 2) if n == name else t)])
        return self.fused(name)

    @staticmethod
    def fused(name):
        """What the trainer's name and the engine's have in common: q, k, v and gate, up are fused there."""
        return name.rsplit(".", 2 if "_proj" in name else 1)[0]

    def lost(self, name):
        def lose(bucket):
            kept = {label: value for label, value in bucket.checksums.items() if label != name}
            return msgspec.structs.replace(bucket, checksums=kept)

        self.rig.control.before["bucket"] = lose
        return name

    def flipped(self, name):
        where, bit = self.rng.random(), int(self.rng.integers(8))

        def flip(bucket):
            if name in bucket.checksums:
                publisher = self.rig.publisher
                part = next(p for p in publisher.layout.slices if p.name == name)
                publisher.buckets.views[part.bucket % 2][part.offset + int(where * 4 * part.length)] ^= 1 << bit

        self.rig.control.before["bucket"] = flip
        return name

    def stale_head(self, name):
        self.rig.fault.write_text("stale head")
        return "lm_head.weight"

    def prefix_cache_kept(self, name):
        self.rig.control.score(list(range(40)))  # a full block of the old version
        self.rig.fault.write_text("prefix cache kept")
        return "prefix cache"


@pytest.fixture(scope="module")
def rig(make_rig):
    rig = make_rig()
    rig.publish()
    return rig


def test_one_fault_of_each_kind_is_refused_by_name(rig):
    assert Campaign(rig, seed=1).run(len(KINDS)) == len(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_of_a_hundred_faults_are_refused_by_name(rig, figure):
    caught = Campaign(rig, seed=2).run(100)
    figure("faults caught before serving, of 100", caught)
    assert caught == 100


def test_without_a_fault_the_same_steps_publish(rig):
    """The campaign could not fail otherwise."""
    rig.change()
    assert rig.publish().changed_share > 0.9
    assert torch.isfinite(torch.tensor(rig.publish().gap.mean))
