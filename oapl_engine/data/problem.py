"""What every source of problems offers: a question by number, and the record its verifier needs."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from oapl_engine.errors import ConfigError, nearest


@dataclass(frozen=True)
class Problem:
    """One question. Two problems are the same when their `text` is.

    id:        unique in its source
    question:  as text; of a chat, the user's last message
    record:    what the verifier gets, JSON
    messages:  the complete chat that the prompt is, each with role and content; empty: the prompt is the question
    place:     where it was read, for errors ("FILE, line 3"); empty: it was generated
    """

    id: str
    question: str
    record: dict[str, Any]
    messages: tuple[dict[str, Any], ...] = ()
    place: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """What the model is asked: the question, or the complete chat as JSON."""
        return json.dumps(self.messages, sort_keys=True, ensure_ascii=False) if self.messages else self.question

    @property
    def full_record(self) -> dict[str, Any]:
        """What its verifier is given: the record, with question and messages beside it."""
        asked = {"question": self.question} | ({"messages": list(self.messages)} if self.messages else {})
        return asked | self.record


@dataclass(frozen=True)
class Source:
    """Problems by number: `problem(i)` is a pure function of i in [0, size).

    finite: the problems are all there are (a file). Otherwise they are generated, and numbers past `size` are spare
    problems that stand in for those which may not be trained on.
    """

    name: str
    size: int
    problem: Callable[[int], Problem]
    finite: bool
    verifier: str
    verifier_options: dict[str, Any] = field(default_factory=dict)


def check_options(options: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raises ConfigError for a name of data.options that `owner` does not have."""
    for name in options:
        if name not in known:
            raise ConfigError(f"data.options.{name}: unknown for {owner}; {nearest(name, known)}")
