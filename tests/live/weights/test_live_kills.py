"""Kills at every phase of a publish: the engine, or the trainer that owns it. 25 + 10 here, 15 more of trainers of a
server that survives them in test_live_stock_server.py."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from oapl_engine.inference.client import EngineLostError
from oapl_engine.inference.supervisor import reclaim_folders
from tests.conftest import PROGRAMS
from tests.unit.weights.test_transports import leftovers

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(1800)]

PHASES = ["pause", "init", "start", "bucket", "finish", "score", "attest", "resume"]
ENGINE_KILLS, OWNER_KILLS = 25, 10
GONE_SECONDS = 5.0


def gone(pid):
    until = time.monotonic() + GONE_SECONDS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def publish_and_ask(rig):
    """A kill after the last call of a publish is noticed by the next one."""
    rig.publish()
    rig.counters()


def segments():
    return {f for f in os.listdir("/dev/shm") if not f.startswith("sem.")}


def test_an_engine_that_is_killed_at_any_phase_is_replaced_and_serves_whole_versions_only(make_rig, figure):
    opened = leftovers()[2]  # of tests before this one
    rig = make_rig()
    rig.publish()
    shared, mixed = segments(), 0
    for kill in range(ENGINE_KILLS):
        dead = rig.engine.pid
        rig.control.kill(dead, PHASES[kill % len(PHASES)], ("before", "after")[kill % 2])
        rig.publisher.engine_restarted()  # so that every publish has an init
        rig.change()
        with pytest.raises(EngineLostError):
            publish_and_ask(rig)
        assert gone(dead)
        rig.control.let_go()
        rig.restart()
        rig.publish()
        mixed += rig.greedy_of_engine() != rig.greedy_of_trainer()
    figure("engines killed", ENGINE_KILLS)
    figure("mixed versions served", mixed)
    assert mixed == 0
    assert segments() <= shared
    left = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in leftovers()[2] - opened}  # a map holds one more descriptor
    assert len(left) <= 2, "the buckets of the last publish"


def test_nothing_of_an_owner_that_is_killed_at_any_phase_survives(tmp_path, figure):
    shared, folders = segments(), set(Path(tempfile.gettempdir()).glob("oapl-weights-*"))
    for kill in range(OWNER_KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        command = [sys.executable, PROGRAMS / "owner.py", folder, PHASES[kill % len(PHASES)]]
        died = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert died.returncode == -signal.SIGKILL, died.stderr
        pid, engine_folder = died.stdout.split()
        assert gone(int(pid)), "the engine outlived its owner"
        reclaim_folders()
        assert not Path(engine_folder).exists()
    figure("owners killed, nothing left behind", OWNER_KILLS)
    assert segments() <= shared
    assert set(Path(tempfile.gettempdir()).glob("oapl-weights-*")) <= folders
