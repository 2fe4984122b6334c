"""Reward 1 where math-verify finds the response's answer equal to record["answer"] (LaTeX or plain), else 0."""

import functools
import logging
from typing import Any

import math_verify

from oapl_engine.errors import ConfigError

# math-verify's own time limit is an alarm signal, which works in a main thread only; the pool has a better one
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check_options(options: dict[str, Any]) -> None:
    """There are none: raises ConfigError."""
    if options:
        raise ConfigError(f'reward.options = {options}: the verifier "math" has none; remove them')


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    del options
    gold = _gold(record["answer"])
    if not gold:
        raise ValueError(f"the record's answer {record['answer']!r} is not a mathematical expression")
    found = math_verify.parse(response, parsing_timeout=None)  # type: ignore[arg-type]
    right = bool(found) and math_verify.verify(gold, found, timeout_seconds=None)
    return float(right), {"answer": str(found[-1]) if found else None}


@functools.lru_cache(maxsize=1024)
def _gold(answer: str) -> list[Any]:
    # without $ … $ only plain numbers are found
    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return math_verify.parse(text, parsing_timeout=None)  # type: ignore[arg-type]
