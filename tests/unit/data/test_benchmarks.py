"""Benchmarks by name from local files; the hub's failure says what a local file must look like."""

import gzip
import json

import pytest

from oapl_engine.config import DataConfig
from oapl_engine.data.benchmarks import BENCHMARKS, benchmark_source
from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_file_is_scored_by_math_verify(tmp_path, name):
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "half of 3?", "answer": "\\frac{3}{2}", "year": 2025}]
    source = benchmark_source(DataConfig(task=name, path=write(tmp_path / "x.jsonl", *rows), options={}))
    problems = [source.problem(i) for i in range(source.size)]
    assert {p.question for p in problems} == {"1 + 1?", "half of 3?"}
    assert (source.verifier, source.finite, source.name) == ("math", True, name)
    for problem in problems:
        right = "so it is \\boxed{1.5}" if "half" in problem.question else "so it is \\boxed{2}"
        assert verify("math", right, problem.record).reward == 1
        assert verify("math", "so it is \\boxed{7}", problem.record).reward == 0


def test_the_final_answer_of_gsm8k(tmp_path):
    rows = [{"question": "How much?", "answer": "9*8*15 = <<9*8*15=1080>>1,080\n#### 1,080"}]
    source = benchmark_source(DataConfig(task="gsm8k", path=write(tmp_path / "x.jsonl", *rows), options={}))
    assert source.problem(0).record["answer"] == "1080"


def test_a_file_of_a_data_frame_is_read_too(tmp_path):
    """Zipped, one array, answers as floats; the verifier gets whole numbers."""
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"problem": "1 + 1?", "answer": 2.0, "year": 2025.0}]).encode()))
    problem = benchmark_source(DataConfig(task="aime25", path=str(path), options={})).problem(0)
    assert (problem.record, problem.place) == ({"answer": "2", "year": 2025.0}, f"{path}, line 1")


def test_bad_files_and_names(tmp_path):
    path = write(tmp_path / "x.jsonl", {"problem": "1 + 1?", "answer": "2"}, {"task": "?", "solution": "2"})
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: columns task, solution; needed are problem .*answer"):
        benchmark_source(DataConfig(task="aime25", path=path, options={}))
    with pytest.raises(ConfigError, match="did you mean aime25"):
        benchmark_source(DataConfig(task="aime_25", path=path, options={}))


def test_without_the_hub_the_error_names_the_columns(monkeypatch):
    """Those that a local file must have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"math-ai/aime25.*--data\.path FILE\.jsonl, columns problem"):
        benchmark_source(DataConfig(task="aime25", path="", options={}))
