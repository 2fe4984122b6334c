"""Every transport carries whole versions into a receiver in another process, notices what is damaged and who is dead,
and leaves nothing behind. The CUDA transports run against a model of the driver: test_cuda_ipc.py."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.receiver import group
from oapl_engine.weights.receiver.inbox import open_inbox
from oapl_engine.weights.transports import make_buckets
from oapl_engine.weights.transports.file import FileBuckets
from oapl_engine.weights.transports.memfd import MemfdBuckets
from tests.conftest import PROGRAMS

TRANSPORTS = ["memfd", "file", "gloo"]
CPU = torch.device("cpu")


class Receiver:
    """Ranks of an engine, a process each."""

    def __init__(self, ranks=1):
        script = PROGRAMS / "receiver_process.py"
        self.ranks = [
            subprocess.Popen([sys.executable, script, str(r)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for r in range(ranks)
        ]
        self.before = {}  # phase → what happens first

    def control(self, phase, payload):
        self.before.get(phase, lambda p: None)(payload)
        if phase in ("pause", "resume", "attest"):
            return {"error": None, "reports": []}
        for rank in self.ranks:
            print(json.dumps([phase, payload]), file=rank.stdin, flush=True)
        replies = [rank.stdout.readline() for rank in self.ranks]
        if not all(replies):
            raise ConnectionError("the receiver is dead")
        replies = [json.loads(reply) for reply in replies]
        errors = [r["error"] for r in replies if r["error"]]
        return {
            "error": errors[0] if errors else None,
            "reports": [r for reply in replies for r in reply["reports"]],
            "found": [reply["found"] for reply in replies],
        }

    def close(self):
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture(scope="module")
def receive():
    """receive(ranks) → Receiver; ended after the module."""
    receivers = []

    def make(ranks=1):
        receivers.append(Receiver(ranks))
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
    return Publisher(trainer.items, receiver.control, bucket_bytes, torch.float32, make_buckets=make)


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
        publisher.publish(version)
        fresh = fused_model()
        fresh.load_weights(trainer.items())
        for found in receiver.control("parameters", {})["found"]:
            for name, parameter in fresh.named_parameters():
                assert bytes(found[name]) == parameter.detach().numpy().tobytes(), name
    assert publisher._buckets.views[0].numel() <= 200
    outside = [a for a in leftovers()[0] if not a.ip.startswith("127.")]
    assert outside == [], "listeners beyond loopback"
    publisher.close()
    assert all(now <= then for now, then in zip(leftovers(), before, strict=True))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_flipped_bit_is_refused_by_name_and_the_next_version_is_whole(transport, receiver, tensors):
    trainer = tensors()
    publisher = publisher_for(transport, receiver, trainer)
    make = publisher._make_buckets

    class Flipped:
        def __getattr__(self, name):
            return getattr(self.buckets, name)

        def send(self, index, length):
            piece = next(p for p in publisher._layout.pieces if p.name == "k")
            if piece.bucket % 2 == index:
                self.views[index][piece.offset + 9] ^= 2
            self.buckets.send(index, length)

    broken = Flipped()
    publisher._make_buckets = lambda size: setattr(broken, "buckets", make(size)) or broken
    with pytest.raises(WeightMismatchError, match=r"^k: expected checksum"):
        publisher.publish(1)
    publisher._make_buckets = make
    assert publisher.publish(2).version == 2
    publisher.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_that_dies_in_mid_bucket_is_noticed_and_its_successor_gets_a_whole_version(
    transport, receive, tensors
):
    doomed, trainer = receive(), tensors()
    doomed.before["bucket"] = lambda payload: payload["bucket"] == 1 and doomed.ranks[0].kill()
    publisher = publisher_for(transport, doomed, trainer)
    with pytest.raises((ConnectionError, RuntimeError)):
        publisher.publish(1)
    publisher.engine_restarted()
    publisher.control = receive().control
    assert publisher.publish(2).version == 2
    publisher.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_trainer_that_dies_in_mid_bucket_is_noticed_by_the_receiver(transport, receiver, tensors):
    """The bucket is announced and nobody sends it (memfd: the bytes of a half packed bucket)."""
    trainer = tensors()
    publisher = publisher_for(transport, receiver, trainer)
    publisher.publish(1)
    buckets = publisher._buckets
    receiver.control("start", {})
    buckets.views[0].fill_(3)
    if transport == "gloo":
        buckets.close()
    elif transport == "file":
        Path(buckets.describe()["paths"][0]).unlink()
    reply = receiver.control("bucket", {"bucket": 0, "length": 320, "checksums": {"embed": 1}})
    assert reply["error"], "nothing of it may count"
    assert reply["reports"][0]["state"] == "incomplete"
    publisher._detach()
    assert publisher.publish(2).version == 2, "the next trainer, or the same one, gets through"
    publisher.close()


def test_what_a_killed_trainer_left_in_a_folder_is_removed_by_the_next_and_not_what_a_living_one_uses(tmp_path):
    living = FileBuckets(64, tmp_path)
    code = (
        "import os, sys, pathlib; from oapl_engine.weights.transports.file import FileBuckets\n"
        "FileBuckets(64, pathlib.Path(sys.argv[1])).send(0, 64); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    successor = FileBuckets(64, tmp_path)
    assert set(tmp_path.iterdir()) == {living.folder, successor.folder}
    living.close()
    successor.close()
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_memfd_bucket_is_sealed():
    buckets = MemfdBuckets(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(buckets.describe()["fds"][0], 8192)
    with pytest.raises(ValueError, match="4096 bytes, 8192 were announced"):
        open_inbox(buckets.describe() | {"size": 8192}, 0, CPU)
    buckets.close()


def test_memory_that_may_shrink_is_refused():
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not sealed in size"):
        open_inbox({"transport": "memfd", "pid": os.getpid(), "fds": [fd], "size": 4096}, 0, CPU)
    os.close(fd)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_bucket_file_of_another_length_is_refused_and_files_are_private(tmp_path, change):
    buckets = FileBuckets(4096, tmp_path)
    buckets.send(0, 1000)
    inbox = open_inbox(buckets.describe(), 0, CPU)
    inbox.take(0, 1000)
    with pytest.raises(ValueError, match=rf"bucket0 has 1000 bytes, {1000 + change} were announced"):
        inbox.take(0, 1000 + change)
    modes = [p.stat().st_mode & 0o077 for p in (buckets.folder, *buckets.folder.iterdir())]
    assert modes == [0, 0]
    buckets.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_transports_are_refused_on_both_sides():
    with pytest.raises(ValueError, match="transport is 'carrier pigeon'; allowed: auto, memfd"):
        make_buckets("carrier pigeon", 64)
    with pytest.raises(ValueError, match="this engine knows memfd, file, gloo, nccl and cuda_ipc"):
        open_inbox({"transport": "carrier pigeon"}, 0, CPU)


def test_a_group_that_nobody_joins_is_an_error(monkeypatch):
    import datetime

    monkeypatch.setattr(group, "TIMEOUT", datetime.timedelta(seconds=1))
    buckets = make_buckets("gloo", 64)
    buckets.send(0, 64)
    with pytest.raises(RuntimeError):
        buckets.wait(0)
    buckets.close()
