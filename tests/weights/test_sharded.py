"""A trainer sharded by FSDP2 publishes from every rank, a bucket gathered at a time; LoRA merges a tensor at a time."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oapl_engine.weights.layout import distinct, elements, lay_out

RANK = Path(__file__).parent / "sharded_rank.py"


@pytest.mark.parametrize("engines", [2, 1])
def test_two_ranks_publish_in_lockstep_and_never_gather_more_than_a_bucket(tmp_path, engines):
    """engines = 1: rank 1 has none and only takes part in the gathers."""
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), str(tmp_path / "store"), str(engines)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    reports = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    for rank, report in enumerate(reports):
        assert report["identical"] is (True if rank < engines else None)
        assert report["largest"] <= report["bucket_elements"] < report["model_elements"] / 3
        assert report["gathered"] == report["model_elements"] * report["publishes"], "each element once a publish"
        assert report["refused"] == (["ConnectionError"] * 3 if rank == 0 else [])


def test_no_tensor_of_a_lazy_source_is_kept_and_equal_addresses_are_not_taken_for_ties():
    alive = []

    def lazily():
        for i in range(6):
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
            tensor = torch.full((50,), float(i))
            made.append(__import__("weakref").ref(tensor))
            yield f"t{i}", tensor
            del tensor

    made = []
    assert list(lay_out(lazily(), torch.float32, 1 << 10).shapes) == [f"t{i}" for i in range(6)]
    assert max(alive) <= 1


def test_tied_names_travel_once():
    weight = torch.zeros(3, 3)
    assert [name for name, _ in distinct([("a", weight), ("b", weight), ("c", weight.view(9))])] == ["a", "c"]


def test_elements_of_a_plain_tensor_are_a_view():
    tensor = torch.arange(12.0).view(3, 4)
    assert elements(tensor, 5, 3).data_ptr() == tensor[1, 1:].data_ptr()
