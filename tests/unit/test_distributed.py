"""Ranks on a machine with GPUs, without any: which device each takes, and how it joins the others."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from oapl_engine import distributed
from oapl_engine.distributed import Ranks, join_ranks


@pytest.fixture
def joined(monkeypatch):
    """What rank 1 of two, on a machine with four GPUs, asked torch for."""
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    return asked


@pytest.mark.parametrize(("gpus", "device"), [(1, 1), (2, 2)])
def test_a_trainer_takes_the_first_gpu_of_its_engine(joined, gpus, device):
    """A publish is read on the trainer's device, which the engine must see; no other rank's engine is there."""
    assert join_ranks(gpus) == Ranks(1, 2)
    assert joined["device"] == device


def test_a_rank_waits_while_another_evaluates(joined):
    """PyTorch's own limit is 30 minutes, and an evaluation may take hours."""
    join_ranks()
    assert joined["timeout"] == distributed.LONGEST_WAIT >= timedelta(hours=12)
