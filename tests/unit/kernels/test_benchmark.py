import json

import pytest
import torch

from benchmarks import kernels


@pytest.fixture
def in_this_process(monkeypatch):
    """The workers' tasks without their processes, which only isolate memory and allocators."""

    def run(task, shape, dtype, sequences, rounds=0, name="", **environment):
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


def test_a_second_run_adds_to_the_file_and_show_prints_it_all(in_this_process, tmp_path, capsys):
    file = str(tmp_path / "figures.json")
    arguments = ["--rounds", "1", "--no-memory", "--json", file, "--dtypes", "float32", "--shapes"]
    for shape in ("64x32x500", "64x16x300", "64x32x500"):
        assert kernels.main([*arguments, shape]) == 0
    assert [r["shape"] for r in json.loads((tmp_path / "figures.json").read_text())["results"]] == [
        "64x16x300",
        "64x32x500",
    ]
    capsys.readouterr()
    assert kernels.main(["--show", file, "--svg", str(tmp_path / "svg")]) == 0
    assert capsys.readouterr().out.count("T=64") == 2


def test_on_a_gpu_times_are_a_share_of_its_peak(in_this_process, monkeypatch, capsys):
    """The code path of a GPU, with a device of a known name and peak."""
    monkeypatch.setattr(kernels, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setitem(kernels.PEAK_FLOPS, "NVIDIA H100", 1e12)
    monkeypatch.setattr(kernels, "time_all", lambda *_: {"products": 1e-5, "ours": 2e-5})
    assert kernels.main(["--shapes", "64x32x500", "--no-memory", "--dtypes", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("products")).endswith("61%")  # 6 * 64 * 32 * 500 in 10 us
    assert next(line for line in lines if line.startswith("ours")).endswith("31%")


def test_the_sweep_says_what_it_leaves_out(in_this_process, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "SWEEP", [("64x8x100", 1), ("256x8x1000", 1), ("2048x8x1000", 4), ("64x8x99", 8)])
    monkeypatch.setattr(kernels, "CPU_LIMIT", 6 * 256 * 8 * 1000 - 1)
    monkeypatch.setattr(kernels, "free_bytes", lambda: 16 * 64 * 99)
    file = tmp_path / "figures.json"
    assert kernels.main(["--sweep", "--dtypes", "float32", "--json", str(file)]) == 0
    cells = json.loads(file.read_text())["sweep"]
    assert [set(cell["passes"]) for cell in cells[1:3]] == [{"scoring"}, set()]
    assert {"ours", "ours, OAPL", "torch recompute"} < set(cells[0]["passes"])
    assert "naive" not in cells[0]["passes"]
    assert "naive" in cells[3]["passes"]
    out = capsys.readouterr().out
    assert "skipped: naive: 0 GB" in out
    assert "skipped: 3.3e+07 FLOPs to score it" in out


def test_growth_is_that_of_memory_beyond_the_gradient_of_hidden(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "GROWTH", [("64x8x100", 8), ("256x8x100", 8)])
    peaks = {"64x8x100": 64 * 8 * 4 + 1000, "256x8x100": 256 * 8 * 4 + 1100}
    monkeypatch.setattr(kernels, "in_fresh_process", lambda task, shape, *_, **__: {"peak_bytes": peaks[shape]})
    assert kernels.main(["--growth", "--dtypes", "float32"]) == 0
    assert capsys.readouterr().out.strip().endswith("+10.0%")


def test_the_static_table_has_ours_and_theirs(monkeypatch, capsys):
    from benchmarks import _ahead_of_time as static

    def broken(target):
        raise TypeError("needs a newer compiler")

    monkeypatch.setattr(static, "TARGETS", {"cuda90": static.TARGETS["cuda90"]})
    monkeypatch.setitem(static.SIDE_BY_SIDE, "broken", broken)
    assert kernels.main(["--static"]) == 0
    rows = {line[:28].strip(): line[37:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows.keys() == static.SIDE_BY_SIDE.keys()
    assert rows["ours, gradient"][1] == "0"
    assert "TypeError: needs a newer compiler" in " ".join(rows["broken"])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_all_contestants_compute_the_same_gradient(dtype, limit):
    found = kernels.errors_and_flops("64x32x500", getattr(torch, dtype), 8)
    errors = {name: figures["error"] for name, figures in found.items() if "error" in figures}
    assert len(errors) >= 4
    assert max(errors.values()) < limit, errors


def test_flops_are_counted():
    found = {name: round(f["flops"], 6) for name, f in kernels.errors_and_flops("64x32x500", torch.float32, 8).items()}
    assert found["ours"] == found["ours, OAPL"] == found["naive"] == 6
    assert found["torch recompute"] == 8
