"""Reward of reasoning-gym's own scorer for the data set that made the problem, in [0, 1]; partial credit is its own."""

import functools
from collections.abc import Callable
from typing import Any

from oapl_engine.reasoning_gym_import import provide_pycosat
from oapl_engine.rewards.exact import check_options, extract_answer

__all__ = ["check_options", "score"]

TUPLES = ("arc_agi", "rearc")  # their scorers compare boards as tuples, JSON has lists


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    answer, entry = extract_answer(response, options), record["entry"]
    if record["dataset"] in TUPLES:
        entry = {**entry, "metadata": _tuples(entry["metadata"])}
    return _scorer(record["dataset"])(answer, entry), {"answer": answer}


@functools.cache
def _scorer(dataset: str) -> Callable[[str | None, dict[str, Any]], float]:
    provide_pycosat()
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(dataset)  # type: ignore[no-any-return]


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
