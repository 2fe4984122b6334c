"""Reward 1 where the answer in the response equals record["answer"] character by character, else 0.

Where in a response the answer is, by the option `extract`:
    all:          the complete response
    first_line:   its first line
    last_number:  the last number in it, thousands commas removed
    after:        what follows the last `marker`
Blanks at both ends are removed.
"""

import re
from typing import Any

from oapl_engine.errors import ConfigError

FORMS = ("all", "first_line", "last_number", "after")
NUMBER = re.compile(r"(?<![\d.])[-−]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:/\d+)?")


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    answer = extract_answer(response, options)
    return float(answer == record["answer"].strip()), {"answer": answer}


def check_options(options: dict[str, Any]) -> None:
    """Raises ConfigError on an unknown option or form, or a marker that is missing or unused."""
    for name in options:
        if name not in ("extract", "marker"):
            raise ConfigError(f"reward.options.{name}: unknown; there are: extract, marker")
    form, marker = options.get("extract", "all"), options.get("marker", "")
    if form not in FORMS:
        raise ConfigError(f"reward.options.extract = {form!r}: one of {', '.join(FORMS)}")
    if (form == "after") != (isinstance(marker, str) and bool(marker)):
        raise ConfigError(f'reward.options.marker = {marker!r}: extract = "after" needs a text, the others use none')


def extract_answer(response: str, options: dict[str, Any]) -> str | None:
    """The answer in a response, None where there is none."""
    form = options.get("extract", "all")
    if form == "first_line":
        return response.partition("\n")[0].strip()
    if form == "last_number":
        numbers = NUMBER.findall(response)
        return numbers[-1].replace(",", "").replace("−", "-") if numbers else None
    if form == "after":
        _, marker, answer = response.rpartition(options["marker"])
        return answer.strip() if marker else None
    return response.strip()
