import json

import pytest
import torch

from benchmarks import kernels


@pytest.fixture
def in_this_process(monkeypatch):
    """The workers' tasks without their processes, which only isolate memory and allocators."""

    def run(task, shape, dtype, sequences, rounds, name="", **environment):
        return kernels.worker(task, shape, getattr(torch, dtype), sequences, rounds, name)

    monkeypatch.setattr(kernels, "in_fresh_process", run)


def test_the_benchmark_runs_and_writes_what_it_prints(in_this_process, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("json", "svg")}
    arguments = ["--shapes", "64x32x500", "--rounds", "1", "--json", str(files["json"]), "--svg", str(files["svg"])]
    assert kernels.main(arguments) == 0
    results = json.loads(files["json"].read_text())["results"]
    assert [(r["shape"], r["dtype"]) for r in results] == [("64x32x500", "float32"), ("64x32x500", "bfloat16")]
    assert set(results[0]["seconds"]["default"]) == {"products", *kernels.contestants()}
    assert "ours, torch" in capsys.readouterr().out
    assert files["svg"].read_text().count("<rect") == 2 * len(results[0]["seconds"]["default"])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_all_contestants_compute_the_same_gradient(dtype, limit):
    errors = kernels.gradient_errors("64x32x500", getattr(torch, dtype), 8)
    assert len(errors) >= 5
    assert max(errors.values()) < limit, errors
