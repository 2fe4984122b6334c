"""Every transport carries whole versions into a receiver in another process, notices what is damaged and who is dead,
and leaves nothing behind. The CUDA transports run against a model of the driver: test_cuda_ipc.py."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from oapl_engine.errors import ConfigError
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.control import Bucket, Start
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import BucketOptions, broadcast, make_buckets, open_reader
from oapl_engine.weights.transports.file import FileBuckets
from oapl_engine.weights.transports.memfd import MemfdBuckets
from tests.support.engines import ReceiverProcesses

TRANSPORTS = ["memfd", "file", "gloo"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def receive():
    """receive(ranks) → ReceiverProcesses; ended after the module."""
    receivers = []

    def make(ranks=1):
        receivers.append(ReceiverProcesses(ranks))
        return receivers[-1]

    yield make
    for receiver in receivers:
        receiver.close()


@pytest.fixture(scope="module")
def receiver(receive):
    """Two ranks that survive their tests."""
    return receive(2)


def publisher_for(transport, receiver, trainer, bucket_bytes=512):
    make = functools.partial(make_buckets, transport, ranks=len(receiver.ranks))
    return Publisher(trainer.items, receiver, bucket_bytes=bucket_bytes, dtype=torch.float32, make_buckets=make)


def leftovers():
    """Open descriptors, shared memory, temporary folders and listeners of ours."""
    here = psutil.Process()
    sockets = {c.laddr for c in here.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    ours = {f for f in os.listdir(tempfile.gettempdir()) if f.startswith("oapl-weights-")}
    memory = {f for f in os.listdir("/proc/self/fd") if "memfd:oapl" in _target(f)}
    return sockets, ours, memory, set(os.listdir("/dev/shm"))


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_versions_arrive_whole_and_nothing_is_left(transport, receiver, fused_model, tensors):
    before, trainer = leftovers(), tensors()
    publisher = publisher_for(transport, receiver, trainer, 200)
    for version in (1, 2, 3):
        for tensor in trainer.values():
            tensor += torch.randn_like(tensor)
        publish_paused(publisher, version)
        fresh = fused_model()
        fresh.load_weights(trainer.items())
        for found in receiver.parameters():
            for name, parameter in fresh.named_parameters():
                assert bytes(found[name]) == parameter.detach().numpy().tobytes(), name
    assert publisher.buckets.views[0].numel() <= 200
    outside = [a for a in leftovers()[0] if not a.ip.startswith("127.")]
    assert outside == [], "listeners beyond loopback"
    publisher.close()
    assert all(now <= then for now, then in zip(leftovers(), before, strict=True))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_flipped_bit_is_refused_and_the_next_version_complete(transport, receiver, tensors):
    """A flipped bit is refused by name and the next version is complete."""
    trainer = tensors()
    publisher = publisher_for(transport, receiver, trainer)
    make = publisher._make_buckets

    class Flipped:
        def __getattr__(self, name):
            return getattr(self.buckets, name)

        def send(self, index, length):
            piece = next(p for p in publisher.layout.slices if p.name == "k")
            if piece.bucket % 2 == index:
                self.views[index][piece.offset + 9] ^= 2
            self.buckets.send(index, length)

    broken = Flipped()
    publisher._make_buckets = lambda size: setattr(broken, "buckets", make(size)) or broken
    with pytest.raises(WeightMismatchError, match=r"^k: expected checksum"):
        publish_paused(publisher, 1)
    publisher._make_buckets = make
    assert publish_paused(publisher, 2).version == 2
    publisher.close()


@pytest.mark.live
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receivers_death_in_mid_bucket_is_noticed(transport, receive, tensors):
    """A receiver that dies in mid bucket is noticed and its successor gets a complete version."""
    doomed, trainer = receive(), tensors()
    doomed.before["bucket"] = lambda request: request.bucket == 1 and doomed.ranks[0].kill()
    publisher = publisher_for(transport, doomed, trainer)
    with pytest.raises((ConnectionError, RuntimeError)):
        publish_paused(publisher, 1)
    publisher.engine_restarted()
    publisher.control = receive()
    assert publish_paused(publisher, 2).version == 2
    publisher.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_trainers_death_in_mid_bucket_is_noticed(transport, receiver, tensors):
    """The bucket is announced and no process sends it (memfd: the bytes of a half packed bucket)."""
    trainer = tensors()
    publisher = publisher_for(transport, receiver, trainer)
    publish_paused(publisher, 1)
    buckets = publisher.buckets
    receiver.update(Start(2))
    buckets.views[0].fill_(3)
    if transport == "gloo":
        buckets.close()
    elif transport == "file":
        Path(buckets.describe()["paths"][0]).unlink()
    reply = receiver.update(Bucket(0, 320, {"embed": 1}))
    assert reply.error, "nothing of it may count"
    assert reply.reports[0]["state"] == "incomplete"
    publisher.engine_restarted()
    assert publish_paused(publisher, 2).version == 2, "the next trainer, or the same one, gets through"
    publisher.close()


def test_files_of_a_killed_trainer_are_removed_by_the_next(tmp_path):
    """What a killed trainer left in a folder is removed by the next and not what a living one uses."""
    living = FileBuckets(BucketOptions(64, tmp_path))
    code = (
        "import os, sys, pathlib; from oapl_engine.weights.transports import make_buckets\n"
        "make_buckets('file', 64, pathlib.Path(sys.argv[1])).send(0, 64); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    successor = FileBuckets(BucketOptions(64, tmp_path))
    assert set(tmp_path.iterdir()) == {living.folder, successor.folder}
    living.close()
    successor.close()
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_memfd_bucket_is_sealed():
    buckets = MemfdBuckets(BucketOptions(4096))
    with pytest.raises(PermissionError):
        os.ftruncate(buckets.describe()["fds"][0], 8192)
    with pytest.raises(ValueError, match="4096 bytes, 8192 were announced"):
        open_reader({"transport": "memfd", **buckets.describe(), "size": 8192}, 0, CPU)
    buckets.close()


def test_memory_that_may_shrink_is_refused():
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not sealed in size"):
        open_reader({"transport": "memfd", "pid": os.getpid(), "fds": [fd], "size": 4096}, 0, CPU)
    os.close(fd)


@pytest.mark.parametrize("change", [-1, 1])
def test_bucket_files_are_private_and_have_their_length(tmp_path, change):
    """A bucket file of another length is refused and files are private."""
    buckets = FileBuckets(BucketOptions(4096, tmp_path))
    buckets.send(0, 1000)
    reader = open_reader({"transport": "file", **buckets.describe()}, 0, CPU)
    reader.wait_for(0, 1000)
    with pytest.raises(ValueError, match=rf"bucket0 has 1000 bytes, {1000 + change} were announced"):
        reader.wait_for(0, 1000 + change)
    modes = [p.stat().st_mode & 0o077 for p in (buckets.folder, *buckets.folder.iterdir())]
    assert modes == [0, 0]
    buckets.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_transports_are_refused_on_both_sides():
    with pytest.raises(ConfigError, match='"carrier pigeon" is not a transport; there are: auto, cuda_ipc, file'):
        make_buckets("carrier pigeon", 64)
    with pytest.raises(ConfigError, match='"carrier pigeon" is not a transport'):
        open_reader({"transport": "carrier pigeon"}, 0, CPU)


def test_a_group_without_its_peer_is_an_error(monkeypatch):
    import datetime

    monkeypatch.setattr(broadcast, "TIMEOUT", datetime.timedelta(seconds=1))
    buckets = make_buckets("gloo", 64)
    buckets.send(0, 64)
    with pytest.raises(RuntimeError):
        buckets.wait(0)
    buckets.close()
