"""Verifiers that misbehave; tests/rewards/test_pool.py runs them in a pool."""

import os
import re
import signal
import time
from pathlib import Path


def good(response, record, options):
    return float(response == record["answer"]), {"pid": os.getpid()}


def sleeps(response, record, options):
    time.sleep(3600)


def backtracks(response, record, options):
    return re.match(r"(a+)+$", "a" * 64 + "b") is None  # holds the GIL for ever


def segfaults(response, record, options):
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(response, record, options):
    os._exit(7)


def raises(response, record, options):
    raise RuntimeError("broken inside")


def prints(response, record, options):
    for _ in range(64):
        os.write(1, b"x" * (1 << 20))
        print("y" * (1 << 20))
    return 1.0


def forks(response, record, options):
    """The grandchild, an orphan in a session of its own, writes its pid, then stays."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        Path(record["file"]).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(3600)
    while not (text := Path(record["file"]).read_text(encoding="utf-8")):
        time.sleep(0.01)
    return float(bool(text))


def forks_and_returns_twice(response, record, options):
    return float(os.fork() > 0)


def eats_memory(response, record, options):
    return float(len(bytearray(1 << 31)))


def nan(response, record, options):
    return float("nan")


def long_detail(response, record, options):
    return 1.0, {"text": "z" * (5 << 20)}


def sleeps_and_tells(response, record, options):
    Path(record["file"]).write_text(str(os.getpid()), encoding="utf-8")
    backtracks(response, record, options)
