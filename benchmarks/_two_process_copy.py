"""What benchmarks/weights.py measures a publish against: the same tensors through two buckets into another process,
with the same cast and nothing else."""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import sys
import time

import oapl_engine  # noqa: F401  before torch: keeps its idle threads from spinning on shared cores

# isort: split
import torch

from oapl_engine.weights.bucket_layout import BucketLayout, NamedTensors


def copy_seconds(weights: NamedTensors, layout: BucketLayout, rounds: int) -> float:
    """Seconds for float32 tensors → bfloat16 in two shared buckets → memory of another process, pipelined."""
    fds = [os.memfd_create("copy") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, layout.size)
    views = [torch.frombuffer(mmap.mmap(fd, layout.size), dtype=torch.uint8) for fd in fds]
    lengths = [slices[-1].offset + 2 * slices[-1].length for slices in layout.buckets()]
    command = [sys.executable, "-m", "benchmarks._two_process_copy", json.dumps([*fds, layout.size, lengths])]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds, bufsize=0)
    assert child.stdin
    assert child.stdout
    child.stdout.read(1)
    tensors, seconds = dict(weights()), []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for number, slices in enumerate(layout.buckets()):
            if number >= 2:
                child.stdout.read(1)
            for p in slices:
                place = views[number % 2][p.offset : p.offset + 2 * p.length].view(torch.bfloat16)
                place.copy_(tensors[p.name].detach().view(-1)[p.start : p.start + p.length])
            child.stdin.write(b".")
        for _ in range(min(2, len(lengths))):
            child.stdout.read(1)
        seconds.append(time.perf_counter() - begin)
    child.stdin.close()
    child.wait()
    for fd in fds:
        os.close(fd)
    return statistics.median(seconds[1:])


def copy_out(description: str) -> None:
    """The other process: copies each bucket into memory of its own, until its input ends."""
    *fds, size, lengths = json.loads(description)
    buffers = [torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8) for fd in fds]
    places = [torch.zeros(length, dtype=torch.uint8) for length in lengths]
    os.write(1, b"r")
    while True:
        for number, place in enumerate(places):
            if not os.read(0, 1):
                return
            place.copy_(buffers[number % 2][: len(place)])
            os.write(1, b".")


if __name__ == "__main__":
    copy_out(sys.argv[1])
