"""Reward 1 where the answer in the response equals record["answer"] character by character, else 0."""

from __future__ import annotations

from typing import Any

from oapl_engine.rewards.extract import extract_answer


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    answer = extract_answer(response, options)
    return float(answer == record["answer"].strip()), {"answer": answer}
