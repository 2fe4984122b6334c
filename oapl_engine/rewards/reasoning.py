"""Reward of reasoning-gym's own scorer for the data set that made the problem, in [0, 1]; partial credit is its own.

A scorer that raises on a response gives 0, with the reason; one that raises on the record's own answer too is an error.
No scorer executes a response (see reasoning_gym_import). Where a scorer rewards nonsense in full, or hangs on it,
MENDED refuses it.

The record: {"dataset": name, "config": the data set's options, "entry": from `encode_entry`}.
"""

import contextlib
import functools
import json
import re
from fractions import Fraction
from typing import Any

from oapl_engine.reasoning_gym_import import create_data_set, decode_entry, reasoning_gym_registry
from oapl_engine.rewards.exact import check_options, extract_answer

__all__ = ["check_options", "score"]

MAX_MOVES = 5000  # characters of them

reasoning_gym_registry()  # imports reasoning_gym: the time limit of a verdict counts from here


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    answer, entry = extract_answer(response, options), decode_entry(record["entry"])
    data_set = _data_set(record["dataset"], json.dumps(record["config"]))
    try:
        accepted = MENDED.get(record["dataset"], _accept)(answer or "", entry["answer"])
        return float(data_set.score_answer(answer, entry)) if accepted else 0.0, {"answer": answer}
    except Exception as error:  # many scorers parse the response and let it fail
        data_set.score_answer(entry["answer"], entry)
        return 0.0, {"answer": answer, "reason": f"the scorer cannot read it: {type(error).__name__}: {error}"[:500]}


@functools.lru_cache(maxsize=8)
def _data_set(name: str, config: str) -> Any:
    return create_data_set(name, json.loads(config))


def _accept(answer: str, right: str) -> bool:
    return True


def _same_word(answer: str, right: str) -> bool:
    """The scorer compares bool(answer), which is true for every text."""
    return answer.casefold() == right.casefold()


def _same_probability(answer: str, right: str) -> bool:
    """The scorer gives "0" all of the credit for a common beginning with "0.375", and for being near 0.00003."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        return abs(Fraction(answer.replace(",", "")) / Fraction(right) - 1) <= Fraction(1, 10**3)
    return False


def _is_number(answer: str, right: str) -> bool:
    """The scorer takes the smaller of 1 and a distance, which is 1 for nan."""
    return "nan" not in answer.casefold()


def _says_nothing_for_none(answer: str, right: str) -> bool:
    """The scorer takes any text without a number for "no solution", which the question asks to leave empty."""
    return bool(right) or not answer.strip("\"'")


def _few_moves(answer: str, right: str) -> bool:
    """The scorer turns the cube as often as the number after a move says."""
    return not re.search(r"\d{3}", answer) and len(answer) < MAX_MOVES


MENDED = {
    "coin_flip": _same_probability,
    "complex_arithmetic": _is_number,
    "game_of_life_halting": _same_word,
    "polynomial_equations": _says_nothing_for_none,
    "rubiks_cube": _few_moves,
}
