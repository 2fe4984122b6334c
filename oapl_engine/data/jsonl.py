"""Problems from a JSON file: one object per line, or one array of them; gzip is read too.

Fields: `question` or `prompt` (text, or a chat as a list of messages; one of them); `answer` (text or number, or verl's
`reward_model.ground_truth`) or `tests`; `id` (text or number, optional; else the line number). Everything else is kept
in the record for the verifier. docs/formats.md has the details.
"""

import datetime
import hashlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source
from oapl_engine.errors import ConfigError
from oapl_engine.rows import Row, check_messages, read_json_rows, row_decoder

DEPTH = 100  # of lists and objects in a record: it is written and read again in threads whose stack is not empty


@dataclass(frozen=True, slots=True)
class WrittenNumber:
    """A number of a JSON file as it is written: an answer 0.10 stays 0.10."""

    text: str

    def value(self) -> int | float | str:
        """As Python has it. Integers of more digits than Python takes from everyone stay text."""
        if not _is_integer(self.text):
            return float(self.text)
        return int(self.text) if len(self.text) <= sys.int_info.str_digits_check_threshold else self.text


def jsonl_source(data: DataConfig) -> Source:
    """Source of the file data.path; read and checked completely. Raises ConfigError with file and line."""
    file = Path(data.path)
    name = Path(file.stem).stem if file.suffix == ".gz" else file.stem
    return finite_source(name, problems_of_rows(problem_rows(file), name))


def problem_rows(file: Path) -> list[Row]:
    """Every row of a file, its numbers as they are written. Raises ConfigError, also where there is none."""
    rows = list(read_json_rows(file, row_decoder(parse_int=WrittenNumber, parse_float=_parse_float)))
    if not rows:
        raise ConfigError(f"data file {file} is empty: one JSON object per line with question and answer")
    return rows


def finite_source(name: str, problems: list[Problem]) -> Source:
    """Source over a list. Ordered by a hash of the text, so that files sorted by topic hold out a fair sample."""
    problems = sorted(problems, key=lambda p: hashlib.sha256(p.text.encode()).digest())
    return Source(name, len(problems), problems.__getitem__, finite=True, verifier="exact")


def problems_of_rows(rows: Iterable[Row], name: str) -> list[Problem]:
    """Checked problems. Numbers may be Python's, numpy's or written ones. Raises ConfigError that names the place."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for place, number, row in rows:
        problem = _problem(row, f"{name}-{number}", place)
        if problem.id in seen:
            raise ConfigError(
                f"{place}: id {problem.id!r} was used before ({seen[problem.id]}): ids must be unique, as text; a row "
                f"without one is called {name}-NUMBER"
            )
        seen[problem.id] = place
        problems.append(problem)
    return problems


def _problem(row: dict[str, Any], default_id: str, place: str) -> Problem:
    questions = [f for f in ("question", "prompt") if f in row]
    if len(questions) != 1:
        what = 'both "question" and "prompt"' if questions else 'no field "question" (or "prompt")'
        raise ConfigError(f"{place}: {what}; one of them is needed (fields found: {', '.join(row) or 'none'})")
    question, messages = _question(row[questions[0]], questions[0], place)
    record = {k: _plain(v, place) for k, v in row.items() if k not in ("id", *questions)}
    if "tests" not in row:
        record["answer"] = _answer(row, place)
    problem_id = _text(row["id"], "id", place) if "id" in row else default_id
    return Problem(problem_id, question, record, messages, place)


def _question(value: Any, field: str, place: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """The question, and the chat where it is one."""
    question = _plain(value, place)
    messages: tuple[dict[str, Any], ...] = ()
    if isinstance(question, list):
        messages = check_messages(question, place, field)
        asked = [message["content"] for message in messages if message["role"] == "user"]
        question = asked[-1] if asked else messages[-1]["content"]
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f'{place}: "{field}" = {question!r:.100} must be a text or a chat, and not empty')
    return question, messages


def _answer(row: dict[str, Any], place: str) -> str:
    nested = row.get("reward_model")
    if row.get("answer") is None and isinstance(nested, dict) and "ground_truth" in nested:
        return _text(nested["ground_truth"], "reward_model.ground_truth", place)
    if "answer" not in row:
        raise ConfigError(f'{place}: no field "answer" (fields found: {", ".join(row)})')
    return _text(row["answer"], "answer", place)


def _text(value: Any, field: str, place: str) -> str:
    """A text, or a number as text: what data frames write as 6.0 is 6, and 1e3 is 1000."""
    plain = _plain(value, place)
    if isinstance(plain, bool) or not isinstance(plain, str | int | float) or not str(plain).strip():
        hint = "" if field == "id" else "; a verifier of your own can read any other field of the row"
        raise ConfigError(f'{place}: "{field}" = {plain!r:.100} must be a text or a number, and not empty{hint}')
    if isinstance(plain, str):
        return plain
    written = value.text if isinstance(value, WrittenNumber) else repr(plain)
    if _is_integer(written):
        return written
    number = Decimal(written if plain else 0)
    whole = int(number)
    return str(whole) if whole == number else written


def _plain(value: Any, place: str, depth: int = 0) -> Any:
    """The value as JSON has it: numpy's and written numbers as Python's, dates as text, NaN (which means missing in a
    data frame) as null. Raises ConfigError for everything else."""
    if depth > DEPTH:
        raise ConfigError(f"{place}: lists and objects are nested more than {DEPTH} deep")
    if isinstance(value, WrittenNumber):
        return value.value()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), place, depth + 1)
    if isinstance(value, dict):
        return {name: _plain(item, place, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, place, depth + 1) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str | int | float | None) or value in (math.inf, -math.inf):
        raise ConfigError(f"{place}: {value!r:.100} is not a value that JSON has: leave it out, or write it as text")
    return value


def _parse_float(text: str) -> WrittenNumber:
    value = float(text)
    underflows = value == 0 and text.lower().partition("e")[0].strip("-0.")
    if math.isinf(value) or underflows:
        raise ValueError(f"{text:.40} is beyond the range of numbers: write it as text")
    return WrittenNumber(text)


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdigit()
