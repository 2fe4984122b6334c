"""Problems from a JSONL file: one object per line.

Fields: `question` or `prompt` (text, one of them); `answer` (text or number) or `tests` (see contracts: code); `id`
(text or number, optional; else the line number). Everything else is kept in the record for the verifier.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source
from oapl_engine.errors import ConfigError, nearest


def jsonl_source(data: DataConfig) -> Source:
    """Source of the JSONL file data.path; read and checked completely. Raises ConfigError with file and line."""
    file = Path(data.path)
    if data.options:
        raise ConfigError(f'data.options = {data.options}: source = "jsonl" has none; remove them')
    return finite_source(file.stem, problems_of_rows(parsed_lines(file), file.stem))


def parsed_lines(file: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """(place, line number, object) of every line. Raises ConfigError, also where there is none."""
    if file.is_dir():
        raise ConfigError(f"data.path = {file} is a directory: name a JSONL file")
    if not file.exists():
        siblings = [p.name for p in file.parent.glob("*") if p.is_file()]
        hint = f"; {nearest(file.name, siblings)}" if siblings else ""
        raise ConfigError(f"data.path = {file} does not exist{hint}")
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"data.path = {file} cannot be read: {error.strerror}") from error
    places = [(f"{file}, line {n}", n, line) for n, line in enumerate(lines, 1) if line.strip()]
    rows = [(place, n, _parse(line, place)) for place, n, line in places]
    if not rows:
        raise ConfigError(f"data file {file} is empty: one JSON object per line with question and answer")
    return rows


def finite_source(name: str, problems: list[Problem]) -> Source:
    """Source over a list. Ordered by a hash of the text, so that files sorted by topic hold out a fair sample."""
    problems = sorted(problems, key=lambda p: hashlib.sha256(p.question.encode()).digest())
    return Source(name, len(problems), problems.__getitem__, finite=True, verifier="exact")


def problems_of_rows(rows: Iterable[tuple[str, int, dict[str, Any]]], name: str) -> list[Problem]:
    """Checked problems of (place, number, row). Raises ConfigError that names the place."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for place, number, row in rows:
        problem = _problem(row, f"{name}-{number}", place)
        if problem.id in seen:
            raise ConfigError(f"{place}: id {problem.id!r} was used before ({seen[problem.id]}): ids must be unique")
        seen[problem.id] = place
        problems.append(problem)
    return problems


def _problem(row: dict[str, Any], default_id: str, place: str) -> Problem:
    questions = [f for f in ("question", "prompt") if f in row]
    if len(questions) != 1:
        what = 'both "question" and "prompt"' if questions else 'no field "question" (or "prompt")'
        raise ConfigError(f"{place}: {what}; one of them is needed (fields found: {', '.join(row) or 'none'})")
    question = row[questions[0]]
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f'{place}: "{questions[0]}" = {question!r} must be a text that is not empty')
    record = {k: v for k, v in row.items() if k not in ("id", *questions)}
    if "tests" not in row:
        record["answer"] = _text(row, "answer", place)
    return Problem(_text(row, "id", place) if "id" in row else default_id, question, record)


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if field not in row:
        raise ConfigError(f'{place}: no field "{field}" (fields found: {", ".join(row)})')
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ConfigError(f'{place}: "{field}" = {value!r} must be a text or a number, and not empty')
    return str(value)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{place}: must be an object like {{"question": …, "answer": …}}, not {type(row).__name__}')
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
