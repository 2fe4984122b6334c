"""The evaluation sets of the field by name, from the hub or a local file: their licences do not let us ship them.

A local file (`data.path`) is one that data.source = "jsonl" reads too, with the columns of COLUMNS.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oapl_engine.config import DataConfig
from oapl_engine.data.hub import hub_source
from oapl_engine.data.jsonl import finite_source, problem_rows, problems_of_rows
from oapl_engine.data.problem import Problem, Source
from oapl_engine.errors import ConfigError, nearest
from oapl_engine.rows import Row

COLUMNS = "problem (text; question is taken too) and answer (text or number)"


@dataclass(frozen=True)
class Benchmark:
    """Where a set is located on the hub, its columns, and how long its answers may be, in tokens."""

    hub: str
    split: str
    max_new_tokens: int
    problem: str = "problem"
    config: str | None = None


BENCHMARKS = {
    "aime25": Benchmark("math-ai/aime25", "test", 32768),
    "hmmt25-february": Benchmark("MathArena/hmmt_feb_2025", "train", 32768),
    "hmmt25-november": Benchmark("MathArena/hmmt_nov_2025", "train", 32768),
    "brumo25": Benchmark("MathArena/brumo_2025", "train", 32768),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 4096),
    "gsm8k": Benchmark("openai/gsm8k", "test", 1024, problem="question", config="main"),
}


def benchmark_source(data: DataConfig) -> Source:
    """Source of benchmark data.task, scored by math-verify. Raises ConfigError that names file and columns."""
    task, path, options = data.task, data.path, data.options
    if task not in BENCHMARKS:
        raise ConfigError(f'data.task = "{task}" is not a benchmark; {nearest(task, BENCHMARKS)}')
    if path:
        if options:
            raise ConfigError(f"data.options = {options}: a local benchmark file has none; remove them")
        source = finite_source(task, problems_of_rows(_local_rows(path), task))
    else:
        b = BENCHMARKS[task]
        columns = {"config": b.config, "split": b.split, "question": b.problem}
        try:
            source = hub_source(dataclasses.replace(data, task=b.hub, options=columns | options))
        except ConfigError as error:
            raise ConfigError(f"{error}. Or name a local file: --data.path FILE.jsonl, columns {COLUMNS}") from error
    return dataclasses.replace(source, name=task, problem=lambda i: _final_answer(source.problem(i)), verifier="math")


def _local_rows(path: str) -> Iterator[Row]:
    for place, number, row in problem_rows(Path(path)):
        question = row.get("question", row.get("problem"))
        if question is None or "answer" not in row:
            raise ConfigError(f"{place}: columns {', '.join(row) or 'none'}; needed are {COLUMNS}")
        yield place, number, {k: v for k, v in row.items() if k != "problem"} | {"question": question}


def _final_answer(problem: Problem) -> Problem:
    """GSM8K writes the solution and then `#### 1,072`: what follows is the answer."""
    _, marker, answer = problem.record["answer"].rpartition("####")
    record = problem.record | {"answer": answer.strip().replace(",", "")}
    return dataclasses.replace(problem, record=record) if marker else problem
