"""A bucket is mapped only as it was announced, shows what the trainer writes, and leaves nothing behind."""

import os

import pytest

from oapl_engine.weights.receiver.attach import attach
from oapl_engine.weights.transports.memfd import MemfdBuckets


def test_what_is_written_on_one_side_is_read_on_the_other():
    buckets = MemfdBuckets(4096)
    mapped = attach(buckets.describe())
    for number, view in enumerate(buckets.views):
        view.fill_(number + 7)
    assert [m.unique().tolist() for m in mapped] == [[7], [8]]
    buckets.close()


def test_a_closed_bucket_leaves_no_descriptor_and_no_shared_memory():
    descriptors, shared = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    buckets = MemfdBuckets(4096)
    mapped = attach(buckets.describe())
    assert set(os.listdir("/dev/shm")) == shared
    buckets.close()
    del mapped
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_the_size_of_a_bucket_is_sealed():
    buckets = MemfdBuckets(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(buckets.describe()["fds"][0], 8192)
    buckets.close()


def test_another_size_than_announced_is_refused():
    buckets = MemfdBuckets(4096)
    with pytest.raises(ValueError, match="4096 bytes, 8192 were announced"):
        attach(buckets.describe() | {"size": 8192})
    buckets.close()


def test_memory_that_may_shrink_is_refused():
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not sealed in size"):
        attach({"transport": "memfd", "pid": os.getpid(), "fds": [fd], "size": 4096})
    os.close(fd)
