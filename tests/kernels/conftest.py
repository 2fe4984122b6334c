import sys
from pathlib import Path

import pytest
import torch
from oapl_kernels import scratch

sys.path.insert(0, str(Path(__file__).parent))  # head_reference, shared by the tests of this folder


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Scratch starts as NaN: whatever is read before it is written shows in the results."""
    monkeypatch.setattr(scratch, "POISON", True)
