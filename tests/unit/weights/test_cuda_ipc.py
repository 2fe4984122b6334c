"""Transport cuda_ipc against a model of the driver: streams are asynchronous, and a wait on an event orders only after
a record that was already issued. Nothing here ran on a GPU."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import ReaderOptions, make_buckets
from oapl_engine.weights.transports.cuda_ipc import CudaBuckets, CudaMemory, CudaReader
from tests.support.engines import ReceiverEngine, assert_identical


class Event:
    """record() is issued behind the trainer's work so far; wait() lets the engine see that work, or does nothing."""

    def __init__(self, driver):
        self.driver, self.recorded = driver, None

    def record(self):
        self.recorded = {handle: memory.clone() for handle, memory in self.driver.owned.items()}

    def wait(self):
        for handle, bytes_then in (self.recorded or {}).items():
            if handle in self.driver.mapped:
                self.driver.mapped[handle].copy_(bytes_then)


class Driver:
    """What the trainer writes lies in `owned`; the engine sees `mapped`, which lags behind until it waits."""

    def __init__(self):
        self.owned, self.events, self.handles, self.alive = weakref.WeakValueDictionary(), {}, 0, True
        self.mapped = weakref.WeakValueDictionary()

    def allocate(self, size):
        self.handles += 1
        memory = torch.zeros(size, dtype=torch.uint8)
        self.owned[self.handles] = memory
        return memory

    def export(self, memory):
        return {"handle": next(h for h, m in self.owned.items() if m is memory)}

    def open(self, description):
        if description["handle"] not in self.owned:
            raise ValueError("cuda_ipc: the trainer's bucket cannot be mapped; is it alive?")
        stale = torch.full_like(self.owned[description["handle"]], 0xEE)
        self.mapped[description["handle"]] = stale
        return stale

    def event(self):
        return Event(self)

    def export_event(self, event):
        self.events[id(event)] = event
        return id(event)

    def open_event(self, handle, device):
        return self.events[handle]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(CudaBuckets, "driver", driver)
    monkeypatch.setattr(CudaReader, "driver", driver)
    return driver


def cuda_buckets(size):
    return make_buckets("cuda_ipc", size)


@pytest.fixture
def pair(driver, fused_model, tensors):
    engine, trainer = ReceiverEngine(fused_model()), tensors()
    publisher = Publisher(trainer.items, engine, bucket_bytes=512, dtype=torch.float32, make_buckets=cuda_buckets)
    yield engine, publisher, trainer
    publisher.close()


def test_three_versions_arrive_through_both_buckets(pair, fused_model):
    engine, publisher, trainer = pair
    for version in (1, 2, 3):
        trainer["k"] += version
        publish_paused(publisher, version)
        assert_identical(engine.receiver.model, trainer, fused_model)
    assert engine.phases.count("bucket") > 2 * 3


@pytest.mark.parametrize("fault", ["never recorded", "announced before it is recorded"])
def test_an_announcement_without_a_record_before_it_is_caught(pair, monkeypatch, fault):
    engine, publisher, trainer = pair
    publish_paused(publisher, 1)
    before = engine.receiver.model.qkv.clone()
    late = {}
    monkeypatch.setattr(CudaBuckets, "send", lambda self, index, length: late.update({index: self.events[index]}))
    if fault.startswith("announced"):
        monkeypatch.setattr(
            CudaBuckets, "wait", lambda self, index: late.pop(index).record() if index in late else None
        )
    for tensor in trainer.values():
        tensor += 1
    with pytest.raises(WeightMismatchError, match=r"^embed: expected checksum .* in the bucket"):
        publish_paused(publisher, 2)
    assert torch.equal(engine.receiver.model.qkv, before)
    assert not engine.serving


def test_a_new_init_lets_go_of_the_handles_before(pair, driver):
    engine, publisher, _ = pair
    for version in range(1, 5):
        publish_paused(publisher, version)
        publisher.engine_restarted()
    gc.collect()
    assert (len(driver.owned), len(driver.mapped)) == (0, 2), "the trainer freed its buckets; the engine maps the last"
    engine.receiver.close()
    gc.collect()
    assert len(driver.mapped) == 0


def test_a_bucket_of_a_dead_trainer_cannot_be_attached(pair, driver):
    _, publisher, _ = pair
    publish_paused(publisher, 1)
    description = publisher.buckets.describe()
    publisher.close()
    gc.collect()
    with pytest.raises(ValueError, match="is it alive"):
        CudaReader(ReaderOptions(description, 0, torch.device("cpu")))


def exported(handle):
    """A tensor whose storage torch exports under this handle."""
    parts = (0, handle, 64, 0, b"counter", 0, b"event", True)
    storage = SimpleNamespace(_share_cuda_=lambda: parts)
    return SimpleNamespace(untyped_storage=lambda: storage, device=torch.device("cuda", 0))


def test_expandable_segments_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    assert CudaMemory().export(exported(b"\x02c" + b"x" * 64))["device"] == "GPU-1"
    with pytest.raises(
        ValueError, match=r"unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF, or use transport nccl"
    ):
        CudaMemory().export(exported(b"\x02e" + b"x" * 64))


def test_a_gpu_that_the_engine_does_not_see_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))
    memory = {"device": "GPU-7", "storage": ["00", 64, 0, "00", 0, "00", True]}
    with pytest.raises(ValueError, match=r"GPU-7 is not visible in the engine, which sees GPU-0, GPU-1; add it"):
        CudaMemory().open(memory)


def test_a_handle_of_a_dead_process_is_refused(monkeypatch):
    def gone(*_):
        raise RuntimeError("CUDA error: invalid resource handle")

    monkeypatch.setattr(CudaMemory, "_index", lambda self, uuid: 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", gone, raising=False)
    with pytest.raises(ValueError, match=r"invalid resource handle.*is it alive"):
        CudaMemory().open({"device": "GPU-0", "storage": ["00", 64, 0, "00", 0, "00", True]})
